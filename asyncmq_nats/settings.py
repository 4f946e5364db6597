"""Settings, read from `ASYNCMQ_NATS_*` environment variables.

Values only; nothing here does I/O.
"""

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, field_serializer, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from asyncmq_nats._logging import escape_controls, get_logger

__all__ = ["Settings", "find_unknown_variables", "mask_login", "parse_servers", "settings"]

logger = get_logger(__name__)

DAY = 86_400.0
ENV_PREFIX: Final = "ASYNCMQ_NATS_"
NOT_SETTINGS: Final = re.compile(r"PARENT|PROCESS|SERVICE_(HOST|PORT.*)|PORT(_\d+_.*)?")
"""Variables with our prefix that our supervisor sets, or Kubernetes for a service of that name."""
SCHEMES: Final = ("nats", "tls", "ws", "wss")
LOGIN: Final = re.compile(r"(?<=//)[^\s,]*@|(?:(?<=^)|(?<=[\s,'\"]))[^/\s,]+@")
HOW_TO_WRITE: Final = (
    "write an address as 'nats://127.0.0.1:4222', or several, in a list or with commas between"
)


def mask_login(text: str) -> str:
    """Return a text about addresses without what is before their `@`.

    Names, passwords and tokens.
    """
    return LOGIN.sub("***@", text)


class Address(str):
    """The address of a server.

    It may have a password or a token in it, which `repr` does not show.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(mask_login(str(self)))


class Secret(str):
    """A password or a token, which `repr` does not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'**********'"


def parse_servers(value: object) -> tuple[Address, ...]:
    """Return the addresses in one string, with commas between, or in several.

    Raises:
        ValueError: there is none, or one that cannot be that of a NATS server.
    """
    parts = (
        [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    )
    texts = [part for part in parts if isinstance(part, str)]
    text = ",".join(texts)
    servers = _split(text)
    if not servers or len(texts) != len(parts):
        raise ValueError(f"servers is {_after_login(repr(value))}: {HOW_TO_WRITE}")
    for server in servers:
        if (problem := _find_problem(server)) is not None:
            following = text.partition(server)[2].partition("://")[0]
            # A login with a comma in it was split: its first part has no `@`.
            shown = "***" if "@" in following else _after_login(server)
            raise ValueError(f"{shown!r} is no address of a NATS server: {problem}; {HOW_TO_WRITE}")
    return tuple(Address(server) for server in servers)


def _after_login(text: str) -> str:
    """Return a text without all before its last `@`: a malformed login has any character."""
    _, at, rest = text.rpartition("@")
    return f"***@{rest}" if at else text


def _find_problem(server: str) -> str | None:
    scheme, separator, _ = server.partition("://")
    if separator and scheme.lower() not in SCHEMES:
        return (
            f"it begins with {scheme + separator!r}, and not with nats://, tls://, ws:// or wss://"
        )
    if not separator and "/" in server:
        return "it has a '/' and no '://'"
    if escape_controls(server) != server or len(server.split()) > 1:
        return "it has blanks or control characters"
    try:
        parts = urlsplit(server if separator else f"nats://{server}")
        host = parts.hostname
    except ValueError:
        return "its host is malformed"
    try:
        if parts.port == 0:
            raise ValueError
    except ValueError:
        return "its port is no number from 1 to 65535"
    return None if host else "it has no host"


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Settings(BaseSettings):
    """The settings of a deployment.

    Durations are seconds; `None` for a time to live keeps the records for ever. Pass an instance to
    a backend to override the environment: `NATSBackend(settings=Settings(stalled_after=5))`. A
    variable that is set to nothing counts as one that is not set. A keyword that is no setting is
    an error, a variable with our prefix that is none a warning; both name the nearest one. The
    `repr` of passwords, tokens and addresses is masked, also in that of `model_dump()`, and
    `model_dump_json()` has them masked.
    `settings.stalled_after = 5` is checked too; a backend reads most of them when it connects.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        env_parse_none_str="none",
        validate_assignment=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    servers: Annotated[tuple[str, ...], NoDecode] = (Address("nats://127.0.0.1:4222"),)
    """Addresses of the NATS servers; in the environment separated by commas."""
    prefix: str = Field("amq", pattern=r"^[A-Za-z0-9_-]{1,32}$")
    """First token of every subject and asset name."""
    apply: bool = False
    """Whether a worker that starts applies these settings to its queues on the server."""
    replicas: int = Field(1, ge=1, le=5)
    """Replicas of the streams this process creates."""
    storage: Literal["file", "memory"] = "file"
    """Storage of the streams this process creates."""
    ready_max_bytes: int | None = Field(None, ge=1)
    """Most bytes of ready jobs in a queue; an `add` beyond raises `StorageFull`.

    `None` is no limit.
    """
    bucket_max_bytes: int | None = Field(None, ge=1)
    """Most bytes of a queue's other records. Set it well above the need: see docs/outages.md."""
    workers_max_bytes: int | None = Field(None, ge=1)
    """Most bytes of the list of workers; some 1 MiB per 100 workers."""
    compression: Literal["none", "s2"] = "none"
    """Compression of the streams this process creates, in file storage."""
    placement_cluster: str | None = None
    """Cluster in which the streams of this process are made."""
    placement_tags: Annotated[tuple[str, ...], NoDecode] = ()
    """Tags of the servers that may store its streams; separated by commas in the environment."""
    domain: str | None = None
    """JetStream domain, for leaf nodes."""
    user: str | None = None
    password: str | None = None
    token: str | None = None
    credentials: str | None = None
    """Path of a `.creds` file."""
    nkey_seed: str | None = None
    """Path of a file with an nkey seed."""
    tls_ca: str | None = None
    """Path of the certificate authority that signed the servers' certificates; turns TLS on."""
    tls_cert: str | None = None
    tls_key: str | None = None
    """Paths of this client's certificate and its key, for servers that ask for one."""

    connect_timeout: float = Field(5.0, gt=0)
    """How long the first connection may take."""
    publish_timeout: float = Field(30.0, gt=0, le=100)
    """How long an unconfirmed write is repeated before `Unconfirmed` is raised.

    Shorter than the server's window for duplicates.
    """
    request_timeout: float | None = Field(None, gt=0)
    """How long any other request is repeated before `Unconfirmed` is raised.

    `None`: `publish_timeout`.
    """

    stalled_after: float = Field(30.0, ge=0.5)
    """A job whose worker is silent for so long is run by another one.

    Workers extend it every third of this.
    """
    max_stalls: int = Field(3, ge=1)
    """A job whose worker was lost this many times ends as failed."""
    unknown_task_timeout: float = Field(3600.0, ge=0)
    """How long a worker puts off a job whose task or format version it does not know.

    Then the job fails. For rolling deploys.
    """
    any_task: bool = False
    """Whether workers run every task they know; by default those of their own queue only."""
    max_retries_limit: int = Field(10_000, ge=0)
    """The most retries a worker grants to a job, whatever the job says."""
    min_retry_delay: float = Field(1.0, ge=0)
    """How long each retry waits at least, from the eleventh on.

    The first ten may follow at once.
    """
    heartbeat_interval: float = Field(5.0, ge=0.5)
    """How often a worker renews its entry in the list of workers."""
    shutdown_timeout: float = Field(30.0, ge=0)
    """How long running jobs may go on after a worker was asked to stop."""
    completed_ttl: float | None = Field(DAY, ge=1)
    """How long the outcome of a completed job is kept."""
    failed_ttl: float | None = Field(30 * DAY, ge=1)
    """How long the outcomes of failed, expired and cancelled jobs are kept."""
    completed_keep: int | None = Field(None, ge=1)
    """How many outcomes of completed jobs a queue keeps at most; `None` is no bound.

    Workers see to it at each heartbeat.
    """
    failed_keep: int | None = Field(None, ge=1)
    """How many outcomes of failed, of expired and of cancelled jobs each a queue keeps at most."""
    progress_ttl: float = Field(DAY, ge=1)
    """How long the last progress report of a job is kept."""
    min_repeat_interval: float = Field(0.05, ge=0.05)
    """The shortest interval of a repeatable and of `repeat_every`; a shorter one is refused.

    A job of another program that has a shorter one is repeated after this.
    """
    job_log_level: Literal["DEBUG", "INFO"] = "DEBUG"
    """Level of the lines that a worker logs when a job starts and when it has completed."""
    job_log_lines: int = Field(200, ge=0, le=10_000)
    """Lines of `current_job().log(…)` that are kept of each attempt, the last ones."""
    job_log_ttl: float = Field(7 * DAY, ge=1)
    """How long these lines are kept."""
    health_port: int | None = Field(None, ge=1, le=65_535)
    """Port at which a worker answers probes: `/livez`, `/readyz`.

    Each process of several has the next one.
    """
    metrics_port: int | None = Field(None, ge=1, le=65_535)
    """Port at which Prometheus reads a worker's metrics, `/metrics`; may be the same.

    Needs the extra `prometheus`.
    """
    probe_host: str = "0.0.0.0"
    """Address of this machine on which both ports are open."""
    health_file: str | None = None
    """Path of a file that a healthy worker writes every two seconds: probes look at its time."""
    loop_block_warning: float | None = Field(1.0, ge=0.1)
    """Seconds for which a task may block the event loop before a warning names it.

    `None` warns of nothing.
    """
    waiting_events: bool = False
    """Whether the server itself tells when a job begins to wait, for programs without this library.

    A fifth more work for it per job that is added. `Queue.events` reads the stream instead.
    """
    metrics: bool = True
    """Whether workers write the history of what they do, from which charts and rates are read."""
    metrics_ttl: float = Field(7 * DAY, ge=60)
    """How long the history is kept."""
    metrics_max_bytes: int | None = Field(None, ge=1)
    """Most bytes of the history; the oldest records go first. `None` is no limit."""
    audit_ttl: float | None = Field(90 * DAY, ge=60)
    """How long the records of what operators did are kept."""
    audit_max_bytes: int | None = Field(None, ge=1)
    """Most bytes of the records of what operators did; the oldest ones go first."""
    scan_interval: float = Field(1.0, gt=0)
    """Kept from AsyncMQ, without effect: nothing is polled.

    Workers search for the effects of lost signals every 30 s, whatever its value.
    """
    tasks: Annotated[tuple[str, ...], NoDecode] = ()
    """Modules a worker imports before it starts, so that their tasks are registered.

    A package stands for all its modules. Separated by commas in the environment.
    """

    max_job_payload_bytes: int | None = Field(None, ge=0)
    """How large a new job may be, within what the server takes (AsyncMQ has the name too)."""
    _backend: Any = PrivateAttr(None)

    @property
    def backend(self) -> Any:
        """The backend of queues that are given none (AsyncMQ `settings.backend`).

        No variable sets it.
        """
        return self._backend

    @backend.setter
    def backend(self, backend: Any) -> None:
        self._backend = backend

    @property
    def request_patience(self) -> float:
        """`request_timeout`, or its default `publish_timeout`."""
        return self.publish_timeout if self.request_timeout is None else self.request_timeout

    @field_validator("servers", mode="plain")
    @classmethod
    def _parse_servers(cls, value: object) -> tuple[str, ...]:
        return parse_servers(value)

    @field_validator("password", "token")
    @classmethod
    def _hide(cls, value: str | None) -> str | None:
        return None if value is None else Secret(value)

    @field_serializer("password", "token", when_used="json")
    def _mask_secret(self, value: str | None) -> str | None:
        return None if value is None else "**********"

    @field_serializer("servers", when_used="json")
    def _mask_servers(self, servers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(mask_login(server) for server in servers)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name in values:
                if name not in cls.model_fields:
                    raise ValueError(f"{name!r} is no setting{_nearest(str(name))}")
        return values

    @field_validator("tasks", "placement_tags", mode="before")
    @classmethod
    def _split_tasks(cls, value: object) -> object:
        return _split(value) if isinstance(value, str) else value


def _nearest(name: str, prefix: str = "") -> str:
    near = get_close_matches(name.lower(), Settings.model_fields, 1)
    shown = prefix + (near[0].upper() if prefix else near[0]) if near else ""
    return f": did you mean {shown}?" if near else ""


def find_unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence on each variable with our prefix that is no setting."""
    sentences = []
    for variable in sorted(environment):
        name = variable.upper().removeprefix(ENV_PREFIX)
        if name == variable.upper() or NOT_SETTINGS.fullmatch(name):
            continue
        if name.lower() not in Settings.model_fields:
            sentences.append(f"{variable} is no setting{_nearest(name, ENV_PREFIX)}")
    return sentences


settings = Settings()
"""The settings of this process, as the environment gave them at import."""

for _sentence in find_unknown_variables(os.environ):
    logger.warning("%s", _sentence)
