"""A web server as a process of its own, and requests to it."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.receiver import PATIENCE

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RUNS_AT = re.compile(r"running on (http://\S+)", re.IGNORECASE)


class Site:
    """A running web server."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self.url = url

    def ask(self, path: str, body: Any = None, form: bytes | None = None) -> tuple[int, Any]:
        """Send a request, a POST if it has a body; return the status and the JSON of the answer."""
        data = form if form is not None else None if body is None else json.dumps(body).encode()
        headers = {} if form is not None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, None

    def read(self, path: str) -> str:
        """Return the text of a page."""
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
            return text


@contextmanager
def serving(
    app: str, directory: Path, *, lifespan: str = "on", **environment: str
) -> Iterator[Site]:
    """Serve an ASGI application by uvicorn on a free port while the block runs.

    It must end in order.
    """
    command = [sys.executable, "-m", "uvicorn", "--port", "0", "--app-dir", str(directory)]
    command += ["--lifespan", lifespan, app]
    process = subprocess.Popen(
        command, env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    log = []
    try:
        for line in process.stderr:
            log.append(line)
            if (found := RUNS_AT.search(line)) is not None:
                break
        else:
            raise AssertionError("".join(log))
        yield Site(process, found[1])
    except BaseException:
        process.kill()
        _, rest = process.communicate(timeout=PATIENCE)
        print("".join(log), rest)
        raise
    process.terminate()
    _, rest = process.communicate(timeout=PATIENCE)
    assert process.returncode in (0, -15), rest
    assert lifespan == "off" or "Application shutdown complete" in rest, rest
    assert "Traceback" not in rest, rest
