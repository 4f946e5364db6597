"""Settings come from the environment and are checked when read."""

from typing import Any

import pytest
from pydantic import ValidationError

from asyncmq_nats.backends import default_backend, set_default_backend
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.exceptions import ConnectionFailed
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.settings import settings as environment


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ASYNCMQ_NATS_{name.upper()}", raising=False)


def test_the_defaults() -> None:
    settings = Settings()
    assert settings.servers == ("nats://127.0.0.1:4222",)
    assert (settings.prefix, settings.replicas, settings.storage) == ("amq", 1, "file")
    assert (settings.stalled_after, settings.shutdown_timeout) == (30.0, 30.0)
    assert settings.completed_ttl == 86_400
    assert settings.failed_ttl == 30 * 86_400
    assert settings.scan_interval == 1.0
    assert settings.tasks == ()


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCMQ_NATS_SERVERS", "nats://a:4222, tls://b:4222,")
    monkeypatch.setenv("ASYNCMQ_NATS_TASKS", "shop.tasks,mail.tasks")
    monkeypatch.setenv("ASYNCMQ_NATS_STALLED_AFTER", "5")
    monkeypatch.setenv("ASYNCMQ_NATS_REPLICAS", "3")
    monkeypatch.setenv("ASYNCMQ_NATS_PREFIX", "shop")
    settings = Settings()
    assert settings.servers == ("nats://a:4222", "tls://b:4222")
    assert settings.tasks == ("shop.tasks", "mail.tasks")
    assert (settings.stalled_after, settings.replicas, settings.prefix) == (5.0, 3, "shop")


def test_a_variable_that_is_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"ASYNCMQ_NATS_{name.upper()}", "")
    assert Settings() == Settings.model_construct()


@pytest.mark.parametrize(
    "value", ["", ",", " , ", [], [""], 5, ["nats://a:4222", 5], b"nats://a:4222"]
)
def test_servers_without_an_address_are_refused_at_once(value: Any) -> None:
    with pytest.raises(ValueError, match=r"servers is .*write an address as 'nats://"):
        NATSBackend(value)
    with pytest.raises(ValidationError, match=r"servers is .*write an address as 'nats://"):
        Settings(servers=value)


@pytest.mark.parametrize(
    "value", [" nats://a:4222 , b", ["nats://a:4222 ", "b"], ("nats://a:4222, b,",)]
)
def test_servers_are_one_text_or_several(value: Any) -> None:
    assert NATSBackend(value).url == "nats://a:4222,b"
    assert Settings(servers=value).servers == ("nats://a:4222", "b")


@pytest.mark.parametrize("server", ["nats://", "nats://a:b:c", "nats://a:99999"])
async def test_an_address_that_is_none_is_shown(server: str) -> None:
    with pytest.raises(ConnectionFailed, match=rf"cannot reach NATS at {server}: nats: invalid"):
        await NATSBackend(server).connect()


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCMQ_NATS_SERVERS", "nats://a:4222")
    assert Settings(servers=("nats://b:4222",)).servers == ("nats://b:4222",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefix", "a.b"),
        ("prefix", ""),
        ("prefix", "a b"),
        ("prefix", "x" * 33),
        ("replicas", 0),
        ("replicas", 6),
        ("storage", "disk"),
        ("stalled_after", 0),
        ("publish_timeout", 0),
        ("publish_timeout", 121),
        ("max_stalls", 0),
        ("shutdown_timeout", -1),
        ("completed_ttl", 0),
        ("failed_ttl", 0.5),
        ("connect_timeout", "soon"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings.model_validate({name: value})


def test_outcomes_may_be_kept_for_ever() -> None:
    settings = Settings(completed_ttl=None, failed_ttl=None)
    assert (settings.completed_ttl, settings.failed_ttl) == (None, None)


def test_settings_can_be_set_and_are_checked_then_too() -> None:
    settings = Settings()
    settings.stalled_after = 7.0
    settings.tasks = ("mail.tasks",)
    assert (settings.stalled_after, settings.tasks) == (7.0, ("mail.tasks",))
    with pytest.raises(ValidationError, match="stalled_after"):
        settings.stalled_after = 0.0
    with pytest.raises(ValidationError, match="no_such_setting"):
        settings.__setattr__("no_such_setting", 1)
    assert settings.stalled_after == 7.0


def test_the_backend_of_queues_that_are_given_none_can_be_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = InMemoryBackend()
    monkeypatch.setattr(environment, "backend", backend)
    assert default_backend() is backend
    assert Queue("work").backend is backend
    set_default_backend(None)
    assert environment.backend is None


def test_a_backend_takes_those_of_the_environment_unless_given_others() -> None:
    assert InMemoryBackend().settings is environment
    mine = Settings(scan_interval=9.0)
    assert InMemoryBackend(settings=mine).settings is mine
    assert Queue("work", InMemoryBackend(settings=mine)).scan_interval == 9.0
