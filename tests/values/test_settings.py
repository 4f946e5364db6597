"""Settings come from the environment and are checked when read."""

import os
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from asyncmq_nats.backends import default_backend, set_default_backend
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.exceptions import ConnectionFailed, PayloadTooLarge
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings, find_unknown_variables
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
    monkeypatch.setenv("ASYNCMQ_NATS_PLACEMENT_TAGS", "ssd, eu")
    monkeypatch.setenv("ASYNCMQ_NATS_STALLED_AFTER", "5")
    monkeypatch.setenv("ASYNCMQ_NATS_REPLICAS", "3")
    monkeypatch.setenv("ASYNCMQ_NATS_PREFIX", "shop")
    settings = Settings()
    assert settings.servers == ("nats://a:4222", "tls://b:4222")
    assert settings.tasks == ("shop.tasks", "mail.tasks")
    assert settings.placement_tags == ("ssd", "eu")
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


@pytest.mark.parametrize(
    ("server", "problem"),
    [
        ("nats://", "it has no host"),
        ("nats://:4222", "it has no host"),
        ("nats://a:b:c", "its port is no number"),
        ("nats://a:99999", "its port is no number"),
        ("nats://a:0", "its port is no number"),
        ("nats://[::1", "its host is malformed"),
        ("redis://localhost:6379/0", "it begins with 'redis://'"),
        ("http://localhost:8222", "it begins with 'http://'"),
        ("amqp://guest:guest@localhost", "it begins with 'amqp://'"),
        ("nats//localhost", "it has a '/' and no '://'"),
        ("localhost:4222/", "it has a '/' and no '://'"),
        ("nats://a\nb", "it has blanks or control characters"),
        ("nats://a b", "it has blanks or control characters"),
    ],
)
def test_an_address_that_is_none_is_refused_at_once(server: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        NATSBackend(server)
    assert "write an address as 'nats://127.0.0.1:4222'" in str(caught.value)
    assert "guest" not in str(caught.value)
    with pytest.raises(ValidationError, match=re.escape(problem)):
        Settings(servers=(server,))


@pytest.mark.parametrize(
    "server", ["localhost", "a:4222", "[::1]:4222", "tls://a", "ws://a:80", "wss://u:p@a:443"]
)
def test_other_forms_of_an_address_are_taken(server: str) -> None:
    assert Settings(servers=(server,)).servers == (server,)


# -- secrets

SECRETIVE = {"servers": "nats://me:s3cr3t@a:1,s3cr3t@b", "password": "s3cr3t", "token": "s3cr3t"}


def test_no_password_is_shown() -> None:
    settings = Settings.model_validate(SECRETIVE)
    backend = NATSBackend(settings=settings)
    shown = (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json())
    for text in (*shown, repr(backend), backend.url, f"{vars(settings)}"):
        assert "s3cr3t" not in text


def test_passwords_are_what_was_given() -> None:
    settings = Settings.model_validate(SECRETIVE)
    assert (settings.password, settings.token) == ("s3cr3t", "s3cr3t")
    assert settings.servers == ("nats://me:s3cr3t@a:1", "s3cr3t@b")
    assert Settings(**settings.model_dump()) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"servers": ["nats://me:s3cr3t@a:99999"]},
        {"servers": ["nats://me:s3cr3t@a", 5]},
        {"servers": "redis://:s3cr3t@a"},
        {"servers": "nats://me:a s3cr3t@a"},
        {"servers": "nats://me:s3cr3t a@a"},
        {"servers": "nats://me:s3cr3t,a@a"},
        {"servers": "nats://b,nats://me:s3cr3t,b,c@a"},
        {"servers": "nats://me:s3cr3t://b@a:0"},
        {"servers": "me:s3cr3t/b@a"},
        {"servers": "nats:/me:s3cr3t@a"},
        {"servers": ["nats://me:s3cr3t a@a", 5]},
        {"password": ["s3cr3t"]},
        {"token": {"s3cr3t": 1}},
        {"password": "s3cr3t", "replicas": 9},
    ],
)
def test_no_error_shows_a_password(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(wrong)
    assert "s3cr3t" not in str(caught.value)


async def test_no_error_of_a_connection_shows_a_password() -> None:
    settings = Settings(servers=("nats://me:s3cr3t@127.0.0.1:1",), connect_timeout=0.5)
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1") as caught:
        await NATSBackend(settings=settings).connect()
    assert "s3cr3t" not in str(caught.value)


# -- what is mistyped


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("server", "servers"), ("replica", "replicas"), ("pasword", "password")],
)
def test_a_mistyped_setting_is_an_error_that_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValidationError, match=rf"'{name}' is no setting: did you mean {nearest}\?"):
        Settings.model_validate({name: "x"})


def test_a_setting_that_is_like_none_is_an_error() -> None:
    with pytest.raises(ValidationError, match="'zzz' is no setting"):
        Settings.model_validate({"zzz": "x"})


def test_a_mistyped_variable_is_named_with_the_nearest() -> None:
    environment = {
        "ASYNCMQ_NATS_SERVER": "nats://a",
        "asyncmq_nats_prefx": "p",
        "ASYNCMQ_NATS_SERVERS": "nats://a",
        "OTHER_SERVER": "x",
    }
    assert find_unknown_variables(environment) == [
        "ASYNCMQ_NATS_SERVER is no setting: did you mean ASYNCMQ_NATS_SERVERS?",
        "asyncmq_nats_prefx is no setting: did you mean ASYNCMQ_NATS_PREFIX?",
    ]


def test_variables_that_kubernetes_or_we_set_are_none_of_ours() -> None:
    names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_CLIENT", "PORT", "PORT_4222_TCP_ADDR"]
    names.append("PARENT")
    assert find_unknown_variables({f"ASYNCMQ_NATS_{name}": "x" for name in names}) == []


def test_a_program_is_warned_of_a_mistyped_variable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import asyncmq_nats.settings"],
        env=os.environ | {"ASYNCMQ_NATS_SERVER": "nats://a"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "did you mean ASYNCMQ_NATS_SERVERS?" in done.stderr


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


# -- the size of a job


async def test_a_job_beyond_the_size_of_the_settings_is_refused() -> None:
    backend = InMemoryBackend(settings=Settings(max_job_payload_bytes=1000))
    queue = Queue("work", backend)
    assert await queue.add("echo", ["x" * 500])
    for add in (
        lambda: queue.add("echo", ["x" * 1000]),
        lambda: queue.enqueue({"task_id": "echo", "args": ["x" * 1000]}),
        lambda: queue.add_bulk([{"task_id": "echo", "args": ["x" * 1000]}]),
    ):
        with pytest.raises(PayloadTooLarge, match="the limit is 1,000"):
            await add()
