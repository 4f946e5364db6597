"""Which server the commands speak to, completion, and the program without its extra."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncmq_nats import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.cli import main
from asyncmq_nats.cli.app import run
from asyncmq_nats.cli.connection import ConnectionOptions, ContextUnusable, resolve
from tests.cli.amq import Amq
from tests.running import make_queue

HOME = "nats://home:4222"


@pytest.fixture
def contexts(tmp_path: Path) -> dict[str, str]:
    """An environment with two contexts, of which one is selected."""
    folder = tmp_path / ".config" / "nats" / "context"
    folder.mkdir(parents=True)
    login = {"url": HOME, "user": "ada", "password": "pw", "creds": "~/x.creds", "nsc": ""}
    (folder / "home.json").write_text(json.dumps(login))
    work = {"url": "tls://work:4222", "token": "t", "jetstream_domain": "hub", "tls_first": True}
    (folder / "work.json").write_text(json.dumps(work | {"inbox_prefix": "_IN"}))
    (folder / "odd.json").write_text(json.dumps({"url": HOME, "nsc": "nsc://a/b/c"}))
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder.parent / "context.txt").write_text("home\n")
    return {"HOME": str(tmp_path)}


def found(env: dict[str, str], **options: Any) -> dict[str, Any]:
    settings, extra = resolve(ConnectionOptions(**options), env)
    return settings.model_dump() | extra


def test_without_anything_it_is_the_local_server(tmp_path: Path) -> None:
    assert found({"HOME": str(tmp_path)})["servers"] == ("nats://127.0.0.1:4222",)


def test_the_selected_context_counts_if_nothing_names_a_server(contexts: dict[str, str]) -> None:
    values = found(contexts)
    assert (values["servers"], values["user"], values["password"]) == ((HOME,), "ada", "pw")
    assert values["credentials"] == os.path.expanduser("~/x.creds")


@pytest.mark.parametrize(
    ("env", "options"),
    [({}, {"server": "nats://other"}), ({"NATS_URL": "nats://other"}, {})],
    ids=["option", "variable"],
)
def test_a_login_goes_to_no_other_server(
    contexts: dict[str, str], env: dict[str, str], options: dict[str, str]
) -> None:
    values = found(contexts | env, **options)
    assert (values["servers"], values["user"]) == (("nats://other",), None)


def test_a_context_that_is_named_wins_over_variables(contexts: dict[str, str]) -> None:
    env = contexts | {"NATS_URL": "nats://other", "NATS_USER": "bob"}
    values = found(env, context="work")
    assert (values["servers"], values["token"]) == (("tls://work:4222",), "t")
    assert (values["domain"], values["tls_handshake_first"]) == ("hub", True)
    assert values["inbox_prefix"] == "_IN"
    values = found(env | {"NATS_CONTEXT": "work"})
    assert (values["servers"], values["user"]) == (("nats://other",), "bob")
    assert found(contexts | {"NATS_CONTEXT": "work"})["servers"] == ("tls://work:4222",)


def test_our_own_variables_come_before_those_of_the_nats_tool(
    contexts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCMQ_NATS_SERVERS", "nats://ours")
    env = contexts | {"NATS_URL": "nats://theirs", "ASYNCMQ_NATS_SERVERS": "nats://ours"}
    assert found(env)["servers"] == ("nats://ours",)
    assert found(env, server="nats://given")["servers"] == ("nats://given",)


def test_timeout_and_prefix_are_settings(contexts: dict[str, str]) -> None:
    values = found(contexts | {"NATS_TIMEOUT": "1500ms"}, prefix="shop")
    assert (values["connect_timeout"], values["request_timeout"]) == (1.5, 1.5)
    assert values["prefix"] == "shop"
    assert found(contexts | {"NATS_TIMEOUT": "9s"}, timeout="2s")["connect_timeout"] == 2.0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing", "cannot be read: No such file"),
        ("odd", "has nsc, which is not supported"),
        ("broken", "is no JSON"),
        ("list", "is no JSON object"),
    ],
)
def test_a_context_that_cannot_be_followed_is_an_error(
    contexts: dict[str, str], name: str, problem: str
) -> None:
    with pytest.raises(ContextUnusable, match=problem):
        found(contexts, context=name)


async def test_options_may_stand_before_the_command(
    amq: Amq, server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    await make_queue(nats_backend, "mail").add("t")
    assert (await amq.ok(f"-s {server.url} queue ls --names")).lines == ["mail"]
    assert (await amq.ok("queue ls --names --prefix other")).lines == []


def test_the_shell_completes_names_of_queues(server: EmbeddedServer) -> None:
    program = "from asyncmq_nats.cli import main; import sys; sys.argv = ['amq']; main()"

    def complete(words: str) -> list[str]:
        env = os.environ | {
            "NATS_URL": server.url,
            "_AMQ_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    for name in ("mail", "main", "post"):
        assert run(["job", "add", name, "t", "-s", server.url]) == 0
    assert complete("amq queue info ma") == ["mail", "main"]
    assert "promote" in complete("amq job pr")


def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "typer" else find(name)
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told == "asyncmq-nats: the command line needs typer: pip install 'asyncmq-nats[cli]'\n"
