"""Settings, read from `ASYNCMQ_NATS_*` environment variables. Values only; nothing here does I/O."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

__all__ = ["Settings", "parse_servers", "settings"]

DAY = 86_400.0


def parse_servers(value: object) -> tuple[str, ...]:
    """Return the addresses in one string, with commas between, or in several.

    Raises:
        ValueError: there is none, or it is something else.
    """
    parts = (
        [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    )
    texts = [part for part in parts if isinstance(part, str)]
    servers = _split(",".join(texts))
    if servers and len(texts) == len(parts):
        return servers
    raise ValueError(
        f"servers is {value!r}: write an address as 'nats://127.0.0.1:4222', or several, in a list or with commas between"
    )


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Settings(BaseSettings):
    """What a deployment chooses. Durations are seconds; `None` for a time to live keeps the records for ever.

    Pass an instance to a backend to override the environment: `NATSBackend(settings=Settings(stalled_after=5))`.
    A variable that is set to nothing counts as one that is not set. `settings.stalled_after = 5` is
    checked too; a backend reads most of them when it connects, so set them before.
    """

    model_config = SettingsConfigDict(
        env_prefix="ASYNCMQ_NATS_",
        env_ignore_empty=True,
        env_parse_none_str="none",
        validate_assignment=True,
        extra="ignore",
    )

    servers: Annotated[tuple[str, ...], NoDecode] = ("nats://127.0.0.1:4222",)
    """Addresses of the NATS servers; in the environment separated by commas."""
    prefix: str = Field("amq", pattern=r"^[A-Za-z0-9_-]{1,32}$")
    """First token of every subject and asset name."""
    replicas: int = Field(1, ge=1, le=5)
    """Replicas of the streams this process creates."""
    storage: Literal["file", "memory"] = "file"
    """Storage of the streams this process creates."""
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
    """How long an unconfirmed write is repeated before `Unconfirmed` is raised; shorter than the server's window for duplicates."""

    stalled_after: float = Field(30.0, ge=0.5)
    """A job whose worker is silent for so long is run by another one. Workers extend it every third of this."""
    max_stalls: int = Field(3, ge=1)
    """A job whose worker was lost so many times ends as failed."""
    unknown_task_timeout: float = Field(3600.0, ge=0)
    """How long a worker puts off a job whose task, or whose version of the format, it does not know; then the job fails. For rolling deploys."""
    any_task: bool = False
    """Whether workers run every task they know; by default those of their own queue only."""
    max_retries_limit: int = Field(10_000, ge=0)
    """The most retries a worker grants to a job, whatever the job says."""
    min_retry_delay: float = Field(1.0, ge=0)
    """How long each retry waits at least, from the eleventh on; the first ten may follow at once."""
    heartbeat_interval: float = Field(5.0, ge=0.5)
    """How often a worker renews its entry in the list of workers."""
    shutdown_timeout: float = Field(30.0, ge=0)
    """How long running jobs may go on after a worker was asked to stop."""
    completed_ttl: float | None = Field(DAY, ge=1)
    """How long the outcome of a completed job is kept."""
    failed_ttl: float | None = Field(30 * DAY, ge=1)
    """How long the outcomes of failed, expired and cancelled jobs are kept."""
    completed_keep: int | None = Field(None, ge=1)
    """How many outcomes of completed jobs a queue keeps at most; `None` is no bound. Workers see to it at each heartbeat."""
    failed_keep: int | None = Field(None, ge=1)
    """Likewise for failed, expired and cancelled jobs, of each kind."""
    progress_ttl: float = Field(DAY, ge=1)
    """How long the last progress report of a job is kept."""
    min_repeat_interval: float = Field(0.05, ge=0.05)
    """The shortest interval of a repeatable and of `repeat_every`. A shorter one is refused; a job
    of another program that has one is repeated after this."""
    scan_interval: float = Field(1.0, gt=0)
    """Kept from AsyncMQ, without effect: nothing is polled. Workers look for what a lost signal left unseen every 30 s, whatever it is."""
    tasks: Annotated[tuple[str, ...], NoDecode] = ()
    """Modules a worker imports before it starts, so that their tasks are registered; of a package, all modules. In the environment separated by commas."""

    max_job_payload_bytes: int | None = Field(None, ge=0)
    """How large a new job may be, beside what the server takes (AsyncMQ `max_job_payload_bytes`)."""
    _backend: Any = PrivateAttr(None)

    @property
    def backend(self) -> Any:
        """The backend of queues that are given none: in `settings` only, and in no variable (AsyncMQ `settings.backend`)."""
        return self._backend

    @backend.setter
    def backend(self, backend: Any) -> None:
        self._backend = backend

    @field_validator("servers", mode="before")
    @classmethod
    def _parse_servers(cls, value: object) -> tuple[str, ...]:
        return parse_servers(value)

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_tasks(cls, value: object) -> object:
        return _split(value) if isinstance(value, str) else value


settings = Settings()
"""The settings of this process, as the environment gave them at import."""
