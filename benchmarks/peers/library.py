"""The libraries that are measured: their adapters, servers and requirements."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

__all__ = ["ADAPTERS", "OURS", "PEERS", "RAW", "Peer"]

ADAPTERS: Final = Path(__file__).parent / "adapters"


@dataclass(frozen=True, slots=True)
class Peer:
    """A row of the table."""

    name: str
    adapter: str
    """The file in `adapters/`, which says how the library is used."""
    server: Literal["nats", "redis", "postgres"]
    requires: tuple[str, ...] = ()
    """Packages for its environment, by pip or npm; none: it runs in the harness's own."""
    note: str = ""
    """A remark for readers of its row."""

    @property
    def is_node(self) -> bool:
        """Whether it runs on Node.js."""
        return self.adapter.endswith(".mjs")


OURS: Final = Peer("asyncmq-nats", "ours.py", "nats")
RAW: Final = Peer(
    "nats-py by hand", "raw_nats.py", "nats", note="not a queue: the least that JetStream costs"
)
PEERS: Final = (
    OURS,
    Peer("AsyncMQ", "asyncmq_redis.py", "redis", ("asyncmq==0.10.1",)),
    Peer("SAQ", "saq_redis.py", "redis", ("saq[redis]==0.26.4", "typing-extensions")),
    Peer(
        "arq",
        "arq_redis.py",
        "redis",
        ("arq==0.28.0",),
        note="takes jobs twice a second, and no more than run at a time",
    ),
    Peer(
        "Celery",
        "celery_redis.py",
        "redis",
        ("celery[redis]==5.7.0",),
        note="its pool of threads; the others are processes, or need gevent or eventlet",
    ),
    Peer("BullMQ", "bullmq_redis.mjs", "redis", ("bullmq@6.7.0", "ioredis@5")),
    Peer(
        "taskiq-nats",
        "taskiq_jetstream.py",
        "nats",
        ("taskiq==0.13.0", "taskiq-nats==0.7.0"),
        note="keeps no results; its scheduler looks each second here, each minute by default",
    ),
    Peer(
        "pgqueuer",
        "pgqueuer_postgres.py",
        "postgres",
        ("pgqueuer[asyncpg]==1.6.0",),
        note="keeps no results; acknowledges in batches",
    ),
    Peer(
        "gylo",
        "gylo_postgres.py",
        "postgres",
        ("gylo[asyncpg]==0.1.0a1",),
        note="an alpha release, its worker in Rust",
    ),
    RAW,
)
