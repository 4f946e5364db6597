"""An environment for each library, with the versions that `library.py` names; made once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.peers.library import ADAPTERS, Peer

__all__ = ["FOLDER", "adapter_command", "make_environment"]

FOLDER: Final = Path(__file__).parent / ".environments"
ROOT: Final = Path(__file__).parents[2]
UVLOOP: Final = "uvloop==0.23.0"
"""In each Python environment: a worker is on it if its library's own program would be."""


def _folder(peer: Peer) -> Path:
    return FOLDER / Path(peer.adapter).stem


def make_environment(peer: Peer) -> None:
    """Install the library, unless the same requirements are there."""
    if not peer.requires:
        return
    folder = _folder(peer)
    wanted = [*peer.requires, *(() if peer.is_node else (UVLOOP,))]
    made = folder / "requirements.json"
    if made.exists() and json.loads(made.read_text()) == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if peer.is_node:
        command = ["npm", "install", "--silent", "--no-save", "--prefix", str(folder), *wanted]
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        command = [*pip, "--disable-pip-version-check", *wanted]
    subprocess.run(command, check=True)
    made.write_text(json.dumps(wanted))


def adapter_command(peer: Peer) -> tuple[list[str], dict[str, str]]:
    """Return how to start the adapter, and the variables that it needs."""
    script = str(ADAPTERS / peer.adapter)
    if peer.is_node:
        return ["node", script], dict(os.environ) | {"PEER_MODULES": str(_folder(peer))}
    if peer.requires:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        programs = _folder(peer) / "bin"
        variables["PATH"] = f"{programs}{os.pathsep}{variables.get('PATH', '')}"
        return [str(programs / "python"), script], variables
    return [sys.executable, script], dict(os.environ) | {"PYTHONPATH": str(ROOT)}
