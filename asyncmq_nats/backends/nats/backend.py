"""`NATSBackend`: the seam on JetStream.

A log is a stream, a record a message, a consumer a durable pull consumer.
"""

import asyncio
import math
import os
import time
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Final, Self

import nats.errors
from anyio import CancelScope, to_thread
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from asyncmq_nats._clock import SYSTEM_CLOCK, Clock
from asyncmq_nats._concurrency import Home, Turns
from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.backends.base import (
    Consumer,
    ConsumerState,
    Delivery,
    Difference,
    Log,
    LogState,
    Puller,
    Record,
    ServerFacts,
    Settle,
    Signal,
    Subscription,
    Write,
)
from asyncmq_nats.backends.nats.connection import Connection, format_time
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.backends.nats.errors import (
    CONSUMER_MISSING,
    STREAM_MISSING,
    api_error,
    mapped_errors,
)
from asyncmq_nats.backends.nats.facts import describe_server, find_refused, read_log_state
from asyncmq_nats.backends.nats.headers import HEADER_ROOM
from asyncmq_nats.backends.nats.lease_keeper import LeaseKeeper
from asyncmq_nats.backends.nats.options import connect_options, server_addresses
from asyncmq_nats.backends.nats.puller import NATSPuller
from asyncmq_nats.backends.nats.reader import Reader
from asyncmq_nats.backends.nats.room import Ballasts, Fills
from asyncmq_nats.backends.nats.staging import Staged
from asyncmq_nats.backends.nats.streams import Assets
from asyncmq_nats.backends.nats.watching import Watch, Watches
from asyncmq_nats.backends.nats.writer import BATCH_LIMIT, Writer
from asyncmq_nats.exceptions import (
    AsyncMQError,
    BackendError,
    Unconfirmed,
)
from asyncmq_nats.settings import Settings, mask_login, parse_servers
from asyncmq_nats.settings import settings as environment

__all__ = ["NATSBackend"]

logger = get_logger(__name__)

SUBJECTS_PAGE: Final = 100_000
DELETES_AT_ONCE: Final = 1_000
NO_MESSAGE: Final = (b"10037", b"10043", b"10057")
"""Codes of an answer that a message is not there."""
FILTERS_AT_ONCE: Final = 200
"""Filters of one request.

Each has up to some 1,100 bytes, and a request must fit into a message.
"""
WATCH_OVERLAP: Final = 1.0
"""Seconds before now from which a watch reads at first, if the server's clock is hardly known."""
MISSING_CODES: Final = (STREAM_MISSING, CONSUMER_MISSING)


class NATSBackend:
    """A queue's store on a NATS server with JetStream, version 2.12.2 or newer.

    Args:
        servers: one address, several with commas between, or a list; `None` takes
            `ASYNCMQ_NATS_SERVERS`.
        settings: instead of those from the environment.
        declare: `False` never creates a stream or a consumer, for producers whose permissions end
            at publishing.
        options: for `nats.connect`: `tls`, `user`, `password`, `token`, `user_credentials`,
            `nkeys_seed`, … They win over settings.

    Raises:
        ValueError: servers has no address.
    """

    def __init__(
        self,
        servers: str | Iterable[str] | None = None,
        *,
        settings: Settings | None = None,
        declare: bool = True,
        **options: Any,
    ) -> None:
        self.settings = settings if settings is not None else environment
        self.clock: Clock = SYSTEM_CLOCK
        self.may_declare = declare
        self._options: dict[str, Any] = dict(options)
        if servers is not None:
            self._options["servers"] = list(parse_servers(servers))
        self._home = Home()
        self._connecting = Turns()
        self._connection: Connection | None = None
        self._life: AsyncGenerator[None, None]
        self._reader: Reader
        self._writer: Writer
        self._fills: Fills
        self._assets = Assets(self.settings, declare=declare)
        self._keeper: LeaseKeeper
        self._dropped_signals = Throttle()
        self._watches: Watches
        self._incarnations: dict[str, str | None] = {}
        self._embedded: EmbeddedServer | None = None

    @classmethod
    def embedded(
        cls,
        store_dir: str | os.PathLike[str] | None = None,
        *,
        port: int = -1,
        settings: Settings | None = None,
        **options: Any,
    ) -> Self:
        """Return a backend with a nats-server of its own on a free loopback port.

        The server ends with `close()`, and starts again when the backend is used.

        `store_dir` keeps the jobs over restarts; without one they go with the server. `port`: -1
        takes a free one. Needs the extra `embedded`.

        Raises:
            ServerBinaryMissing: there is no nats-server program.
        """
        server = EmbeddedServer(store_dir, port)
        server.start()
        logins = ("user", "password", "token", "user_credentials", "nkeys_seed")
        options = dict.fromkeys(logins) | options  # those of the settings are for other servers
        backend = cls(server.url, settings=settings, **options)
        backend._embedded = server
        return backend

    def copy(self) -> Self:
        """Return another backend on the same servers, not connected, for another event loop.

        It uses an embedded server too, and leaves its life to this one.
        """
        given = {"servers": self.url} if self._embedded is not None else {}
        options = self._options | given
        return type(self)(settings=self.settings, declare=self.may_declare, **options)

    @property
    def url(self) -> str:
        """The address of the embedded server with its token, for other processes.

        For other servers: their addresses without the login before an `@`, safe to log.
        """
        if self._embedded is not None:
            return self._embedded.url
        return ",".join(map(mask_login, server_addresses(self.settings, self._options)))

    @property
    def server_pid(self) -> int | None:
        """The process of the embedded server; `None` if there is none, or it has ended."""
        embedded = self._embedded
        return embedded.pid if embedded is not None and embedded.is_running else None

    # -- life

    async def connect(self) -> None:
        self._come_home()
        if self._connection is None:
            async with self._connecting:
                if self._connection is None:
                    await self._open()

    def _come_home(self) -> None:
        """Drop the connection of an event loop that has ended."""
        if self._home.loop is asyncio.get_running_loop():
            return
        forked = self._home.is_elsewhere
        if self._home.move() and self._connection is not None:
            if not forked:  # otherwise the socket is the parent's too
                self._keeper.abandon()
                self._connection.abandon()
            self._connection = None

    async def _open(self) -> None:
        if self._embedded is not None:
            await to_thread.run_sync(self._embedded.start)  # again, after `close`
        options = connect_options(self.settings, self._options)
        connection = Connection(self.settings, options)
        keeper = LeaseKeeper(options, self.settings.stalled_after)
        life = _live(connection, keeper)
        await anext(life)
        try:
            await connection.open()
            reader = Reader(connection, self.settings.request_patience)
            timeout, forget = self.settings.publish_timeout, self._assets.forget
            writer = Writer(connection, timeout, reader.last, forget)
            await writer.open()
        except BaseException:
            await life.aclose()
            raise
        ballasts = Ballasts(connection, self.write, self.last, self.delete, lambda: writer.is_full)
        writer.on_full = ballasts.release_all
        self._fills = Fills(connection)
        self._assets.use(connection, ballasts, self._fills)
        self._reader, self._writer, self._keeper = reader, writer, keeper
        self._connection, self._life = connection, life
        self._watches = Watches(reader, connection.background)

    async def close(self) -> None:
        self._come_home()
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._life.aclose()
        self._home.leave()
        if self._embedded is not None:
            with CancelScope(shield=True):
                await to_thread.run_sync(self._embedded.stop)

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:  # then no one calls `__aexit__`
            with CancelScope(shield=True):
                await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _open_connection(self) -> Connection:
        if self._connection is None or self._home.loop is not asyncio.get_running_loop():
            await self.connect()
        assert self._connection is not None
        return self._connection

    def _require_connection(self) -> Connection:
        if self._connection is None:
            raise BackendError("not connected: connect() first")
        return self._connection

    async def ping(self) -> float:
        connection = await self._open_connection()
        begun = time.monotonic()
        with mapped_errors(connection.servers):
            try:
                async with asyncio.timeout(self.settings.connect_timeout):
                    await connection.client.barrier()
            except TimeoutError:
                raise Unconfirmed("a ping", self.settings.connect_timeout, read=True) from None
        return time.monotonic() - begun

    @property
    def is_full(self) -> bool:
        return self._connection is not None and self._writer.is_full

    @property
    def reconnects(self) -> int:
        return 0 if self._connection is None else self._connection.reconnects

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and self._connection.client.is_connected

    def now(self) -> float:
        connection = self._connection  # written out: each job asks three times
        if connection is None:
            return time.time()
        return time.monotonic() + connection.server_clock.offset

    def now_at_least(self) -> float:
        connection = self._connection
        return -math.inf if connection is None else connection.server_clock.now_at_least()

    def now_at_most(self) -> float:
        connection = self._connection
        return time.time() if connection is None else connection.server_clock.now_at_most()

    @property
    def reads_may_lag(self) -> bool:
        connection = self._connection
        return connection is None or connection.client.is_clustered or bool(self.settings.domain)

    @property
    def timers_lag(self) -> bool:
        return True

    @property
    def max_body(self) -> int:
        connection = self._connection
        most = 1024 * 1024 if connection is None else connection.client.max_payload
        return most - HEADER_ROOM

    # -- assets

    async def declare_log(self, log: Log) -> None:
        await self._open_connection()
        await self._assets.declare_log(log)

    async def describe_server(self) -> ServerFacts | None:
        return await describe_server(await self._open_connection())

    async def find_refused(self, publish: Sequence[str], subscribe: Sequence[str]) -> list[str]:
        connection = await self._open_connection()
        with mapped_errors(connection.servers):
            return await find_refused(connection, publish, subscribe)

    async def compare(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[Difference]:
        await self._open_connection()
        return await self._assets.compare(log, consumers, settings)

    async def change(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[Difference]:
        await self._open_connection()
        return await self._assets.change(log, consumers, settings)

    async def incarnation(self, name: str) -> str | None:
        connection = await self._open_connection()
        answer = await connection.call(f"STREAM.INFO.{name}")
        created = str(answer["created"]) if self._found(name, answer) else None
        if self._incarnations.setdefault(name, created) != created:
            self._incarnations[name] = created
            self._assets.forget(name)  # nothing that was declared is there any more
        return created

    async def delete_log(self, name: str) -> bool:
        connection = await self._open_connection()
        answer = await connection.call(f"STREAM.DELETE.{name}")
        self._assets.forget(name)
        return self._found(name, answer)

    async def list_logs(self, prefix: str) -> list[str]:
        names = await self._list_names("STREAM.NAMES", "streams")
        return [name for name in names if name.startswith(prefix)]

    async def declare_consumer(self, log: str, consumer: Consumer) -> None:
        await self._open_connection()
        await self._assets.declare_consumer(log, consumer)

    async def list_consumers(self, log: str) -> list[str]:
        return await self._list_names(f"CONSUMER.NAMES.{log}", "consumers")

    async def _list_names(self, subject: str, key: str) -> list[str]:
        connection = await self._open_connection()
        names: list[str] = []
        while True:
            answer = await connection.require(subject, {"offset": len(names)})
            page = answer.get(key) or []
            names += page
            if not page or len(names) >= answer["total"]:
                return sorted(names)

    async def look_up(self, log: str, consumer: str) -> ConsumerState | None:
        connection = await self._open_connection()
        info = await connection.call(f"CONSUMER.INFO.{log}.{consumer}")
        if info.get("error", {}).get("err_code") == CONSUMER_MISSING:
            self._assets.forget_consumer(log, consumer)
            return None
        if "error" in info:
            raise api_error(log, info["error"])
        return ConsumerState(
            info["num_pending"],
            info["num_ack_pending"],
            info["delivered"]["stream_seq"],
            info.get("paused", False),
            info.get("num_waiting", 0),
        )

    async def pause(self, log: str, consumer: str, until: float) -> None:
        connection = await self._open_connection()
        await connection.require(
            f"CONSUMER.PAUSE.{log}.{consumer}", {"pause_until": format_time(until)}
        )

    async def resume(self, log: str, consumer: str) -> None:
        connection = await self._open_connection()
        await connection.require(f"CONSUMER.PAUSE.{log}.{consumer}", {})

    # -- records

    def write(self, log: str, *writes: Write) -> Coroutine[Any, Any, int]:
        # Each coroutine that awaits another costs a hundredth of a small job.
        if self._connection is None or self._home.loop is not asyncio.get_running_loop():
            return self._connect_and_write(log, writes)
        if len(writes) != 1 or self._fills.needs_check(log):
            return self._check_and_write(log, writes)
        return self._writer.write(log, writes)

    async def _connect_and_write(self, log: str, writes: Sequence[Write]) -> int:
        await self.connect()
        return await self._check_and_write(log, writes)

    async def _check_and_write(
        self, log: str, writes: Sequence[Write], staged: Staged | None = None
    ) -> int:
        if not 1 <= len(writes) <= BATCH_LIMIT:
            raise BackendError(
                f"{len(writes)} writes in one batch: "
                f"at least 1 and at most {BATCH_LIMIT} are possible"
            )
        if self._fills.needs_check(log):
            await self._fills.check(log, writes)
        return await self._writer.write(log, writes, staged)

    def stage(self, log: str) -> Staged:
        self._require_connection()
        return self._writer.stage(log, self._check_and_write)

    async def write_each(self, log: str, writes: Sequence[Write]) -> list[int | AsyncMQError]:
        await self._open_connection()
        await self._fills.check(log, writes)
        return await self._writer.write_each(log, writes)

    def send(self, log: str, write: Write, settle: Settle, *, timeout: float | None = None) -> None:
        self._require_connection()
        self._writer.send(log, write, settle, timeout)

    async def last(self, log: str, *filters: str) -> list[Record]:
        await self._open_connection()
        if len(filters) <= FILTERS_AT_ONCE:
            return await self._reader.last(log, *filters)
        found: dict[int, Record] = {}
        for part in batched(filters, FILTERS_AT_ONCE):
            found |= {record.sequence: record for record in await self._reader.last(log, *part)}
        return [found[sequence] for sequence in sorted(found)]

    async def latest(self, log: str, filter: str) -> Record | None:
        await self._open_connection()
        return await self._reader.latest(log, filter)

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
        await self._open_connection()
        return await self._reader.page(
            log, filter, from_sequence=from_sequence, limit=limit, mostly=mostly, index=index
        )

    async def page_back(
        self,
        log: str,
        filter: str,
        *,
        before: int | None = None,
        limit: int = 100,
        index: str | None = None,
    ) -> list[Record]:
        await self._open_connection()
        if before is None:
            newest = await self._reader.latest(log, ">")
            before = 1 if newest is None else newest.sequence + 1
        return await self._reader.page_back(log, filter, before=before, limit=limit, index=index)

    async def count(self, log: str, filter: str | None = None) -> int:
        connection = await self._open_connection()
        if filter is not None:
            return await self._reader.count(log, filter)
        return int((await connection.require(f"STREAM.INFO.{log}"))["state"]["messages"])

    async def describe_log(self, log: str) -> LogState | None:
        connection = await self._open_connection()
        answer = await connection.call(f"STREAM.INFO.{log}")
        return read_log_state(answer) if self._found(log, answer) else None

    async def list_subjects(self, log: str, filter: str) -> list[str]:
        connection = await self._open_connection()
        subjects: list[str] = []
        while True:
            payload = {"subjects_filter": filter, "offset": len(subjects)}
            page = (await connection.require(f"STREAM.INFO.{log}", payload))["state"].get(
                "subjects"
            ) or {}
            subjects += page
            if not page or len(page) < SUBJECTS_PAGE:
                return subjects

    async def last_sequence(self, log: str) -> int:
        connection = await self._open_connection()
        return int((await connection.require(f"STREAM.INFO.{log}"))["state"]["last_seq"])

    async def delete(self, log: str, sequence: int) -> bool:
        connection = await self._open_connection()
        # Every delayed job comes by here: what needs no more than a look is not parsed.
        subject, body = (
            f"{connection.api_prefix}STREAM.MSG.DELETE.{log}",
            b'{"seq":%d,"no_erase":true}' % sequence,
        )
        in_doubt = False
        try:
            reply = (await connection.collect(subject, body, timeout=2.0, finished=bool))[0]
        except TimeoutError:
            in_doubt = True  # an earlier request may have removed it, and its answer been lost
        else:
            if b'"success":true' in reply.body:
                return True
        answer = await connection.call(
            f"STREAM.MSG.DELETE.{log}", {"seq": sequence, "no_erase": True}
        )
        if answer.get("error", {}).get("err_code") in MISSING_CODES:
            raise api_error(log, answer["error"])
        return in_doubt or bool(answer.get("success", False))

    def discard(self, log: str, sequence: int) -> None:
        connection = self._require_connection()
        if connection.client.is_connected:
            body = b'{"seq":%d,"no_erase":true}' % sequence
            connection.call_unheard(f"STREAM.MSG.DELETE.{log}", body)

    async def delete_many(self, log: str, sequences: Sequence[int]) -> list[int]:
        connection = await self._open_connection()
        subject = f"{connection.api_prefix}STREAM.MSG.DELETE.{log}"
        bodies = [b'{"seq":%d,"no_erase":true}' % sequence for sequence in sequences]
        replies = await connection.ask_each(subject, bodies, timeout=5.0, under_way=DELETES_AT_ONCE)
        removed: list[int] = []
        for sequence, reply in zip(sequences, replies, strict=True):
            if reply is None:
                await self.delete(log, sequence)
                gone = True  # by this, or by the first request, whose answer was lost
            else:
                gone = b'"success":true' in reply.body
                if not gone and not any(code in reply.body for code in NO_MESSAGE):
                    gone = await self.delete(log, sequence)
            if gone:
                removed.append(sequence)
        return sorted(removed)

    async def purge(
        self, log: str, filter: str, *, before: int | None = None, keep: int | None = None
    ) -> int:
        everything = filter == ">" and before is None and keep is None
        if before is not None and before <= 1:  # the server takes 0 for "no limit"
            return 0
        only = (
            await self._only_record(log, filter, before)
            if keep is None and ("*" in filter or ">" in filter) and not everything
            else None
        )
        if only is not None:
            return int(await self.delete(log, only.sequence))
        connection = await self._open_connection()
        # Without a filter the server drops its files, with one it looks at each record.
        payload: dict[str, Any] = {} if filter == ">" else {"filter": filter}
        if before is not None:
            payload["seq"] = before
        elif keep:
            payload["keep"] = keep
        answer = await connection.require(f"STREAM.PURGE.{log}", payload)
        return int(answer.get("purged", 0))

    async def _only_record(self, log: str, filter: str, before: int | None) -> Record | None:
        """Return the record that a purge by a wildcard would remove, if it is one only.

        nats-server (2.15.1, `filestore.PurgeEx`) then tells its consumers the filter instead of the
        subject, and their counts go wrong.
        """
        page = [
            record
            for record in await self.page(log, filter, limit=2, mostly=True)
            if before is None or record.sequence < before
        ]
        return page[0] if len(page) == 1 else None

    @staticmethod
    def _found(name: str, answer: Mapping[str, Any]) -> bool:
        if "error" not in answer:
            return True
        if answer["error"].get("err_code") in MISSING_CODES:
            return False
        raise api_error(name, answer["error"])

    # -- leases and signals

    def puller(
        self,
        log: str,
        on_delivery: Callable[[Delivery], None],
        on_lapse: Callable[[str], None],
        *,
        extend: bool = True,
    ) -> Puller:
        connection = self._require_connection()

        async def declare(consumer: str) -> None:
            await self._assets.restore_consumer(log, consumer)

        return NATSPuller(
            connection, log, (on_delivery, on_lapse), declare, self._keeper if extend else None
        )

    async def publish(self, subject: str, body: bytes = b"") -> None:
        connection = await self._open_connection()
        connection.post(subject, body)
        await connection.client.make_room()

    def signal(
        self, subject: str, body: bytes = b"", on_unheard: Callable[[], None] | None = None
    ) -> None:
        connection = self._require_connection()
        reply = b"" if on_unheard is None else connection.reply_if_unheard(on_unheard)
        try:
            connection.client.signal(subject.encode(), body, reply)
        except nats.errors.MaxPayloadError:
            error = connection.too_large(subject, len(body))
            if times := self._dropped_signals.note():
                logger.warning("%d signals were not sent: %s", times, error)

    async def subscribe(self, subject: str, on_signal: Callable[[Signal], None]) -> Subscription:
        connection = await self._open_connection()

        async def on_message(msg: Msg) -> None:
            try:
                on_signal(Signal(msg.subject, msg.data, msg.reply))
            except Exception:  # a malformed signal must not end the subscription
                logger.exception("a callback for signals on %.200s failed", subject)

        with mapped_errors(connection.servers):
            interest = _Interest(
                connection, await connection.client.subscribe(subject, cb=on_message)
            )
            try:
                async with asyncio.timeout(self.settings.request_patience):
                    await (
                        connection.client.barrier()
                    )  # interest is known to the server when this returns
            except TimeoutError:
                await interest.unsubscribe()
                raise Unconfirmed(
                    f"the subscription to {subject}", self.settings.request_patience, read=True
                ) from None
        return interest

    async def watch(self, log: str, filter: str, on_record: Callable[[Record], None]) -> Watch:
        await self._open_connection()
        after = max(self.now_at_least(), self.now() - WATCH_OVERLAP)
        watch = Watch(self._watches, log, filter, on_record, after)
        await watch.begin()
        return watch

    async def request(
        self, subject: str, body: bytes = b"", *, timeout: float = 1.0
    ) -> bytes | None:
        connection = await self._open_connection()
        try:
            reply = (await connection.collect(subject, body, timeout=timeout, finished=bool))[0]
        except TimeoutError:
            return None
        return None if reply.status == "503" else reply.body


def batched(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield the values in parts of up to `size`."""
    for first in range(0, len(values), size):
        yield values[first : first + size]


async def _live(connection: Connection, keeper: LeaseKeeper) -> AsyncGenerator[None, None]:
    """Close the connection when this is closed.

    The backend closes it, or `asyncio.run` when it ends the event loop. `asyncio.run` closes every
    asynchronous generator while the loop still runs, and nothing else that was left open.
    """
    try:
        yield
    finally:
        with CancelScope(shield=True):
            await keeper.stop()
            await connection.close()


class _Interest:
    """A core NATS subscription."""

    def __init__(self, connection: Connection, subscription: NatsSubscription) -> None:
        self._connection = connection
        self._subscription = subscription

    async def unsubscribe(self) -> None:
        if not self._connection.client.is_closed:
            with mapped_errors(self._connection.servers):
                await self._subscription.unsubscribe()
