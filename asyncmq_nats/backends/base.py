"""The seam: a log of subjects. Bytes, subjects, sequences and leases live here, and never a job.

A *log* is an ordered set of records. A record has a subject, a body, a sequence (1, 2, 3, … per
log, never reused) and the time the server stored it. **A log keeps the last record of each
subject**: a new write to a subject replaces the one before it (at once, but for
`Write.beside`).
A *filter* is a subject in which `*` stands for one token and a final `>` for one or more.
`tests/contract` states every promise made here, for both backends. Terms of NATS:
log = stream, write = publish.

All times are Unix seconds by the *server's* clock, all durations seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from asyncmq_nats._clock import Clock
from asyncmq_nats.exceptions import AsyncMQError, BackendError
from asyncmq_nats.settings import Settings

__all__ = [
    "Backend",
    "Consumer",
    "ConsumerState",
    "Delivery",
    "Expect",
    "Log",
    "LogState",
    "Puller",
    "Record",
    "Settle",
    "Settled",
    "Signal",
    "Staged",
    "Subscription",
    "Timer",
    "Watching",
    "Write",
]


@dataclass(frozen=True, slots=True)
class Log:
    """Declaration of a log.

    `work_queue`: a record is removed when a consumer's delivery of it is acknowledged; consumers'
    filters must not overlap.
    `timers`: writes may carry a `timer` or a `ttl`. `republish`: (filter, destination): each stored
    record is also sent as a signal to the destination, in which `{{wildcard(n)}}` stands for the
    n-th `*` of the filter.
    `ballast`: subject of a record that a backend may keep to delete it when the store is full.
    `max_bytes`: of a log that is no work queue; beyond, a server removes the oldest records.
    """

    name: str
    subjects: tuple[str, ...]
    work_queue: bool = False
    timers: bool = False
    republish: tuple[str, str] | None = None
    ballast: str | None = None
    max_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Consumer:
    """Declaration of a consumer.

    A cursor over the records of a log that match any of `filters`, oldest first. With a `lease` it
    is pulled from, and a delivery that is neither settled nor extended for this many seconds is
    delivered again. A consumer without a lease only counts: it delivers nothing, and
    `ConsumerState.pending` is the number of matching records.
    """

    name: str
    filters: tuple[str, ...]
    lease: float | None = None
    paused_until: float | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Facts about a server and the account.

    `clock_offset`: seconds by which the clock of this machine is ahead of the server's.
    `mixes_up_expectations`: whether batches may be refused, or accepted, by what others expect.
    `None`: this login may not ask, or there is no limit.
    """

    version: str
    servers: str
    is_clustered: bool
    mixes_up_expectations: bool
    max_body: int
    clock_offset: float | None
    stored_bytes: int | None
    max_stored_bytes: int | None


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that holds a replica of a log.

    `lag`: operations that it has not applied yet. `silent_seconds`: since its leader heard of it,
    or since that one leads, if it never did.
    """

    name: str
    is_offline: bool
    is_current: bool
    lag: int
    silent_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between an asset on the server and its declaration, in the server's words.

    `can_change`: whether it can be changed while the queue is in use.
    """

    asset: str
    key: str
    found: Any
    wanted: Any
    can_change: bool


@dataclass(frozen=True, slots=True)
class ConsumerState:
    """The counts of a consumer, at a cost that does not depend on the number of records.

    `pending`: matching records never delivered yet. `leased`: delivered and not settled.
    `delivered_sequence`: the highest one delivered.
    `paused`: whether it delivers nothing at present. `waiting_pulls`: requests of all pullers that
    wait for records.
    """

    pending: int
    leased: int
    delivered_sequence: int
    paused: bool = False
    waiting_pulls: int = 0


@dataclass(frozen=True, slots=True)
class LogState:
    """How large a log is, and how it is kept. `max_bytes`: its limit; `None` is none.

    `storage`: `file` or `memory`. `replicas_behind`: replicas that are not up to date, or away.
    `has_leader`: whether there is a server now that serves it; `peers`: the others that hold it.
    """

    records: int
    bytes: int
    last_sequence: int
    replicas: int = 1
    replicas_behind: int = 0
    storage: str = "memory"
    max_bytes: int | None = None
    has_leader: bool = True
    peers: tuple[Peer, ...] = ()


@dataclass(slots=True)  # frozen ones take four times as long to make, and each job needs one
class Expect:
    """Condition of a write.

    The last record that matches `filter` has `sequence` (0: there is none).
    """

    filter: str
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Timer:
    """At time `at` the body is written to `target` and the record that carries the timer goes.

    Up to 0.25 s late, never early.
    """

    at: float
    target: str


@dataclass(slots=True)  # frozen ones take four times as long to make, and each job needs one
class Write:
    """One record to be written.

    `expect`: refused unless it holds. `ttl`: the record goes after this many seconds (1 at least).
    `timer`: see `Timer`.
    `message_id`: a second write to the log with the same one within two minutes changes nothing and
    is confirmed like the first; in a batch it is refused. The server may check this before or after
    what the write expects. `removes`: subject of a record with a timer that is removed with this
    write. Only records with a timer: some servers refuse others. `marker`: the record says that its
    subject was deleted (a KV delete marker); give it a `ttl`, it counts as a record while it lives.
    `index`: subject of an empty record, an index entry, that is stored just before this one, with
    the same `ttl`. Should this one be refused, the entry may be there without it; never the other
    way round.
    `when_full`: makes a smaller body of `body`, which is stored instead when the store has no room
    for that.
    `beside`: a record that is there may stay beside this one until it is removed by its sequence.
    For a subject whose older record another process may be removing right now: some servers then
    take the new one for the old one.
    `once`: it rests on what was read elsewhere. If the connection is lost before it is confirmed,
    and the server does not know its message id, it is refused instead of repeated: look again.
    """

    subject: str
    body: bytes
    expect: Expect | None = None
    ttl: float | None = None
    timer: Timer | None = None
    message_id: str | None = None
    removes: str | None = None
    marker: bool = False
    beside: bool = False
    index: str | None = None
    when_full: Callable[[bytes], bytes] | None = None
    once: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """One record as stored. `time`: when the server stored it.

    `marker`: only a record of a KV bucket (`$KV.…`) is one: on other subjects strangers set
    headers.
    """

    subject: str
    body: bytes
    sequence: int
    time: float
    marker: bool = False


class Delivery(Protocol):
    """A record on lease to one puller.

    The lease is extended, also while the event loop is blocked, until the delivery is settled
    (`ack`, `nak`) or abandoned.
    """

    subject: str
    body: bytes
    sequence: int
    deliveries: int
    """How often the record has been delivered, this time included: 1 for the first."""
    consumer: str
    pending: int
    """Records of the consumer that were never delivered yet, when this one was."""

    @property
    def first(self) -> bool:
        """Whether it is known to be the only delivery of the record so far.

        A server that was killed may have forgotten earlier ones: it counts from one again.
        """

    @property
    def stamp(self) -> bytes | int:
        """When the server stored the record, in Unix nanoseconds.

        `int` makes a number of it: of many at once, that is cheaper than `time`.
        """

    @property
    def time(self) -> float:
        """When the server stored the record, in Unix seconds."""

    def ack(self) -> None:
        """Settle: the work is done, and a work queue removes the record.

        Sent, not confirmed; accepted even when the lease has run out.
        """

    def nak(self, delay: float = 0.0) -> None:
        """Settle: give it back, to be delivered again to any puller after `delay`.

        Sent, not confirmed.
        """

    def abandon(self) -> None:
        """Stop extending the lease without settling.

        The holder of a newer delivery of the record decides about it.
        """


class Puller(Protocol):
    """Deliveries against credit, from any number of consumers of one log, into one callback.

    Credit is what was requested and neither delivered nor given up by the server. No credit, no
    delivery.
    """

    @property
    def silent_for(self) -> float:
        """Seconds since an unanswered request of this puller; 0 if there is none."""

    def outstanding(self, consumer: str) -> int:
        """Return the credit that the server still holds for this consumer."""

    async def request(self, consumer: str, count: int, *, wait: float) -> None:
        """Ask for up to `count` records, for `wait` seconds at most (0: only what is there now).

        Credit that lapses, because the time is over or the consumer, the connection or the server
        is gone, is taken off
        `outstanding` and `on_lapse(consumer)` is called. A consumer that vanished is declared
        again.
        """

    async def withdraw(self) -> None:
        """Take all credit back.

        When this returns, deliveries that were on their way have arrived; no more come until the
        next request. `on_lapse` is not called.
        """

    async def close(self) -> None:
        """Take no more deliveries.

        When this returns, those that were on their way have arrived, and no more come. Leases in
        hand are extended until they are settled or abandoned; `on_lapse` is not called any more.
        """


class Staged(Protocol):
    """A batch of writes, on its way while it is made. Nothing of it is stored before `commit`."""

    async def add(self, *writes: Write) -> None:
        """Add writes: 1,000 in all at most. They may be sent now."""

    async def commit(self) -> int:
        """Store all of them, as `Backend.write` does, with its errors. Nothing is added then."""

    def drop(self) -> None:
        """Store nothing of it, unless it was committed. Does not block."""


class Subscription(Protocol):
    """Interest in signals."""

    async def unsubscribe(self) -> None:
        """Receive no more signals."""


class Watching(Subscription, Protocol):
    """Interest in the records of a log."""

    def covers(self, sequence: int, time: float) -> bool:
        """Return whether a record was stored since this began. `time`: when it was."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A message that is not stored: at most once, to those that listen now.

    `reply`: the subject for an answer, or ''.
    """

    subject: str
    body: bytes
    reply: str = ""


Settled = int | BackendError
Settle = Callable[[Settled], None]
"""Called with the sequence of the record, or the error. Must not block: hand work over."""


class Backend(Protocol):
    """A store of logs.

    Making one does no I/O: it connects on first use, or by `connect`. It serves one event loop at a
    time, and the next one when that has ended. Every method may raise `ConnectionFailed`,
    `ServerUnsuitable` or `PermissionRefused`, and `AssetMissing` where it names an asset.
    """

    settings: Settings
    may_declare: bool
    """Whether it creates logs and consumers that are missing.

    If not, `declare_log` and `declare_consumer` do nothing.
    """

    @property
    def clock(self) -> Clock:
        """The clock of its workers: the system's, unless a test sets another."""

    @property
    def reads_may_lag(self) -> bool:
        """Whether a read may miss a write that was confirmed: a replica answered it."""

    @property
    def timers_lag(self) -> bool:
        """Whether a timer may release a record as it was before a write that was confirmed."""

    async def connect(self) -> None:
        """Connect, unless connected."""

    async def close(self) -> None:
        """Close the connection.

        Unsettled deliveries return to the log when their leases run out.
        """

    async def ping(self) -> float:
        """Ping the server; return how long the answer took, in seconds.

        Raises:
            Unconfirmed: no answer within `connect_timeout`.
        """

    @property
    def is_full(self) -> bool:
        """Whether a write to a bucket (`$KV.…`) was refused a moment ago.

        The server has no room.
        """

    async def __aenter__(self) -> Self:
        """Do what `connect` does."""

    async def __aexit__(self, *_: object) -> None:
        """Do what `close` does."""

    @property
    def reconnects(self) -> int:
        """How often the present connection was lost and made again."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now, and not one that is lost and being made again."""

    def now(self) -> float:
        """Return the server's time."""

    def now_at_least(self) -> float:
        """Return a time that the server's clock has certainly reached, near `now`."""

    def now_at_most(self) -> float:
        """Return a time that the server's clock has not passed, near `now`: delays count from it.

        So no job starts early that is to wait for some time.
        """

    @property
    def max_body(self) -> int:
        """Return the largest body a write may have, in bytes."""

    async def declare_log(self, log: Log) -> None:
        """Make sure the log exists.

        One that exists with other settings stays as it is; a warning is logged that names the
        difference.
        """

    async def describe_server(self) -> ServerFacts | None:
        """Return facts about the server; `None` if there is no server."""

    async def find_refused(self, publish: Sequence[str], subscribe: Sequence[str]) -> list[str]:
        """Return which subjects this login may not publish or subscribe to; change nothing."""

    async def compare(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[Difference]:
        """Return how the log and these consumers differ from the settings.

        A missing one does not differ.
        """

    async def change(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[Difference]:
        """Change what differs and can be changed; return what was changed."""

    async def incarnation(self, name: str) -> str | None:
        """Return an id that differs from that of an earlier log of the same name.

        `None`: there is no log.
        """

    async def delete_log(self, name: str) -> bool:
        """Remove the log, its records and its consumers. Return whether it was there."""

    async def list_logs(self, prefix: str) -> list[str]:
        """Return the names of the logs that begin with `prefix`, sorted."""

    async def declare_consumer(self, log: str, consumer: Consumer) -> None:
        """Make sure the consumer exists; as for `declare_log`."""

    async def list_consumers(self, log: str) -> list[str]:
        """Return the names of the log's consumers, sorted."""

    async def look_up(self, log: str, consumer: str) -> ConsumerState | None:
        """Return the state of the consumer, or `None` if there is none."""

    async def pause(self, log: str, consumer: str, until: float) -> None:
        """Have the server deliver nothing of the consumer until then. Leases in hand go on."""

    async def resume(self, log: str, consumer: str) -> None:
        """End a pause, and serve the credit that was requested before or during it.

        The same happens when the time of a pause is over.
        """

    async def write(self, log: str, *writes: Write) -> int:
        """Write all or nothing; at most 1,000 writes, each of another subject.

        Return the sequence of the last one. Repeated until it is confirmed or
        `settings.publish_timeout` is over. A repetition within two minutes is confirmed and never
        writes twice, even if the records are gone.

        Raises:
            WriteRefused: an expectation does not hold.
            PayloadTooLarge: a body is larger than `max_body`.
            StorageFull: there is no room, and there was none for a second.
            StreamBusy: other programs keep as many batches open as the server allows.
            Unconfirmed: the deadline passed.
        """

    def stage(self, log: str) -> Staged:
        """Begin a batch whose writes are sent while it is made. Connect before.

        End it within seconds, by `commit` or `drop`: a server keeps a few open batches only.
        """

    def send(self, log: str, write: Write, settle: Settle, *, timeout: float | None = None) -> None:
        """Like `write` for one write, but return at once, and tell `settle` later.

        Repeated until confirmed, for `timeout` seconds at most; then `settle` gets `Unconfirmed`.
        A repetition never writes twice while what the write expects does not hold again. Connect
        before.
        """

    async def write_each(self, log: str, writes: Sequence[Write]) -> list[int | AsyncMQError]:
        """Write each by itself, many at a time, as `write` does.

        Return for each, in order, its sequence or the error that `write` would raise.

        Raises:
            StorageFull: there is no room for them.
        """

    async def last(self, log: str, *filters: str) -> list[Record]:
        """Return the last record of each subject that matches any of the filters, by sequence.

        Markers are included.
        """

    async def latest(self, log: str, filter: str) -> Record | None:
        """Return the matching record with the highest sequence, `None` if there is none.

        Its sequence is the one for an `Expect` of this filter.
        """

    async def page(
        self,
        log: str,
        filter: str,
        *,
        from_sequence: int = 1,
        limit: int = 100,
        mostly: bool = False,
        index: str | None = None,
    ) -> list[Record]:
        """Return up to `limit` matching records from the sequence `from_sequence` on, by sequence.

        `mostly`: a hint that most of the records there may match.
        `index`: filter of index entries; a hint that each match has one just before it.
        """

    async def page_back(
        self,
        log: str,
        filter: str,
        *,
        before: int | None = None,
        limit: int = 100,
        index: str | None = None,
    ) -> list[Record]:
        """Return up to `limit` matching records whose sequence is below `before`, the newest first.

        Fast where most records match. `index`: see `page`.
        """

    async def count(self, log: str, filter: str | None = None) -> int:
        """Return the number of records, or of those that match.

        With a filter it is a search: half a second at a million. A consumer that counts costs less.
        """

    async def describe_log(self, log: str) -> LogState | None:
        """Return how large the log is and how it is kept; `None`: there is none."""

    async def list_subjects(self, log: str, filter: str) -> list[str]:
        """Return the subjects that have a record. Costs as much as there are."""

    async def last_sequence(self, log: str) -> int:
        """Return the highest sequence given out so far, 0 in a log that never had a record."""

    async def delete(self, log: str, sequence: int) -> bool:
        """Remove one record. Its lease, if there is one, ends.

        Return whether it was there, or may have been: the answer to a first try may be lost.
        """

    def discard(self, log: str, sequence: int) -> None:
        """Like `delete`, but sent and not confirmed: the record may stay. Connect before."""

    async def delete_many(self, log: str, sequences: Sequence[int]) -> list[int]:
        """Remove many records, many at a time.

        Return the sequences of those that were there, or may have been, in order.
        """

    async def purge(
        self, log: str, filter: str, *, before: int | None = None, keep: int | None = None
    ) -> int:
        """Remove the matching records, those below sequence `before` or all but the last `keep`.

        Return their number. With a filter it costs as much as the log has matching records; `>`
        costs little more than what it removes.
        """

    def puller(
        self,
        log: str,
        on_delivery: Callable[[Delivery], None],
        on_lapse: Callable[[str], None],
        *,
        extend: bool = True,
    ) -> Puller:
        """Return a puller. The callbacks must not block.

        `extend=False` leaves the leases to run out.
        """

    async def publish(self, subject: str, body: bytes = b"") -> None:
        """Send a signal.

        Raises:
            PayloadTooLarge: the server would not take it.
        """

    def signal(
        self, subject: str, body: bytes = b"", on_unheard: Callable[[], None] | None = None
    ) -> None:
        """Send a signal without waiting for room. Connect before.

        Dropped while there is no connection; dropped with a warning if the server would not take
        it. `on_unheard` is called soon if the server says that no one listens to it.
        """

    async def subscribe(self, subject: str, on_signal: Callable[[Signal], None]) -> Subscription:
        """Call `on_signal` for every signal whose subject matches, from now on.

        Its exceptions are logged.
        """

    async def watch(self, log: str, filter: str, on_record: Callable[[Record], None]) -> Watching:
        """Call `on_record` for each matching record that is stored from now on, in order.

        At most once, up to 0.2 s late, or more beside more than ten others: one that is removed
        before that is missed, and so are those of a log that this login may not read. The log may
        be missing. The callback's exceptions are logged.
        """

    async def request(
        self, subject: str, body: bytes = b"", *, timeout: float = 1.0
    ) -> bytes | None:
        """Send a signal and return the first answer, or `None` if no one answers in time."""
