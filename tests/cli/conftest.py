"""Fixtures of the tests of the command line."""

import pytest

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from tests.cli.amq import Amq

VARIABLES = ("NATS_URL", "NATS_CONTEXT", "NATS_USER", "NATS_PASSWORD", "NATS_TIMEOUT", "NATS_CREDS")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of this machine counts: no variable of a server, no context."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "no-contexts"))


@pytest.fixture
def amq(server: EmbeddedServer, capsys: pytest.CaptureFixture[str]) -> Amq:
    return Amq(server.url, capsys)
