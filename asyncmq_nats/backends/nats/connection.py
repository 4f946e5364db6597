"""One NATS connection with a reply inbox of our own.

Requests, JetStream API calls, direct gets, and the server's clock. nats-py creates a future, a task
and a uuid for a request; one wildcard subscription and a dict of callbacks is ten times as fast.
Every exception of nats-py ends here or in `errors.py`; none reaches the user.
"""

import asyncio
import itertools
import json
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

import nats.errors

from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.backends.nats._client.client import (
    MAX_CONTROL_LINE,
    DirectClient,
    parse_headers,
    status_of,
)
from asyncmq_nats.backends.nats.errors import (
    NO_JETSTREAM,
    NO_PEERS,
    api_error,
    is_full,
    mapped_errors,
)
from asyncmq_nats.backends.nats.server_clock import ServerClock
from asyncmq_nats.exceptions import (
    BackendError,
    ConnectionFailed,
    ConnectionLost,
    PayloadTooLarge,
    PermissionRefused,
    ServerUnsuitable,
    Unconfirmed,
)
from asyncmq_nats.settings import Settings, mask_login

__all__ = ["ANSWER_SIZE", "Connection", "Reply", "format_time", "parse_time", "patience_with"]

logger = get_logger(__name__)

OLDEST_SERVER: Final = (2, 12, 2)
ANSWER_SIZE: Final = 4 * 1024 * 1024
"""Bytes that what is asked for at once may have, if messages are not larger.

The server disconnects a client for which 64 MiB wait.
"""
REQUEST_TIMEOUT: Final = 5.0

HEARING: Final = 5.0
"""Seconds within which a server says that no one listens to a subject."""
LONG_CALL_TIMEOUT: Final = 600.0
"""A purge takes as long as there is to remove."""
READ_CALLS: Final = ("INFO", "STREAM.INFO", "STREAM.NAMES", "CONSUMER.INFO", "CONSUMER.NAMES")
LONG_CALLS: Final = ("STREAM.PURGE", "STREAM.DELETE")
REFUSAL: Final = re.compile(
    r'permissions violation for (?:publish|subscription) to "(.+?)"', re.IGNORECASE
)


class Reply(NamedTuple):
    """An answer to a request."""

    body: bytes
    raw_headers: bytes | None

    @property
    def status(self) -> str:
        """The status code, such as `"503"`, or `""`."""
        return status_of(self.raw_headers)

    @property
    def headers(self) -> dict[str, str]:
        """The headers, parsed."""
        return parse_headers(self.raw_headers)


MOST_CANCELLATIONS: Final = 50
"""How often a cancelled attempt to connect is cancelled again, if it goes on."""


class Connection:
    """A connected client, its reply inbox, and what was learnt of the server.

    `options`: of `nats.connect`.
    """

    def __init__(self, settings: Settings, options: Mapping[str, Any]) -> None:
        self._settings = settings
        self._options = options
        self._api = f"$JS.{settings.domain}.API." if settings.domain else "$JS.API."
        self.client = DirectClient()
        """For callers inside this package."""
        self._collectors: dict[bytes, Callable[[Reply], None]] = {}
        self.servers = ", ".join(map(mask_login, options["servers"]))
        """The addresses, for messages: without passwords."""
        self._requests: dict[bytes, tuple[str, asyncio.Future[None]]] = {}
        self._tokens = itertools.count(1)
        self._inbox = b""
        self._slow = Throttle()
        self.server_clock = ServerClock()
        self.on_reconnect: list[Callable[[], None]] = [self._interrupt_requests]
        self.reconnects = 0
        """How often this connection was made again."""
        self.on_close: list[Callable[[], None]] = [self._end_requests]
        self.on_refusal: list[Callable[[str, str], None]] = [self._refuse_requests]
        """Called with a subject that this user may not use, and the server's words.

        nats-py 2.16 gives the subject *in lower case*.
        """
        self.is_probing = False
        """Whether a probe expects refusals, which are not logged then."""
        self.background = Background()

    @property
    def api_prefix(self) -> str:
        """The prefix of the subjects of the JetStream API, with its last dot."""
        return self._api

    async def open(self) -> None:
        """Connect, and make sure the server can do what we need.

        Raises:
            ConnectionFailed: nothing answered within `connect_timeout`.
            ServerUnsuitable: the server is too old, or JetStream is off.
            PermissionRefused: this user may not receive replies.
        """
        callbacks = {
            "error_cb": self._on_error,
            "reconnected_cb": self._on_reconnected,
            "disconnected_cb": self._on_disconnected,
        }
        try:
            await self._connect({**callbacks, **self._options})
        except (TimeoutError, OSError, nats.errors.Error) as error:
            reason = self.client.last_error or error
            await self._close_client()
            raise ConnectionFailed(self.servers, str(reason) or type(reason).__name__) from error
        self._inbox = self.client.new_inbox().encode() + b"."
        await self._listen_for_replies()
        self._check_version()

    async def _connect(self, options: dict[str, Any]) -> None:
        connecting = asyncio.ensure_future(self.client.connect(**options))
        try:
            await asyncio.wait({connecting}, timeout=self._settings.connect_timeout)
            if not connecting.done():
                raise TimeoutError
            connecting.result()
        finally:
            for _ in range(MOST_CANCELLATIONS):  # nats-py may swallow one, and go on (2.16)
                if connecting.done():
                    break
                connecting.cancel()
                await asyncio.wait({connecting}, timeout=0.1)

    async def _listen_for_replies(self) -> None:
        refusals: list[str] = []
        inbox = self._inbox.decode() + "*"
        self.on_refusal.append(
            lambda subject, text: refusals.append(text) if subject == inbox.lower() else None
        )
        await self.client.listen(inbox, self._on_reply)
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                await self.client.barrier()
        except (TimeoutError, nats.errors.Error) as error:
            await self._close_client()
            raise ConnectionFailed(self.servers, str(error) or "it does not answer") from error
        self.on_refusal.pop()
        if refusals:
            await self._close_client()
            raise PermissionRefused(f"receiving replies at {inbox}", refusals[0])

    def _check_version(self) -> None:
        if self._version < OLDEST_SERVER:
            raise ServerUnsuitable(
                f"nats-server {'.'.join(map(str, self._version))} at {self.servers} is too old",
                "it lacks message schedules and atomic batches, "
                "or (2.12.1) a read beside a write can lock a stream for good: "
                f"upgrade it to {'.'.join(map(str, OLDEST_SERVER))} or newer",
            )
        if self.mixes_up_expectations and self._settings.replicas > 1:
            logger.warning(
                "nats-server %d.%d.%d at %s does not see what batches expect "
                "that are on their way to its replicas: jobs may wait "
                "for others for ever; upgrade it to 2.12.14, 2.14.4 or newer",
                *self._version,
                self.servers,
            )

    @property
    def _version(self) -> tuple[int, int, int]:
        version = self.client.connected_server_version
        return version.major, version.minor, version.patch

    @property
    def mixes_up_expectations(self) -> bool:
        """Whether the server confuses the expectations of the writes of a batch (nats-server#8377).

        Before 2.12.14 and 2.14.4 it remembers each filter as a place in a buffer, into which the
        next write of the batch is read. Where the next filter is at the same place, it is taken for
        the one before, and its expectation is refused, or not looked at. So there each filter of a
        batch is at a place of its own, by as many blanks before it.
        """
        return self._version < ((2, 12, 14) if self._version < (2, 13) else (2, 14, 4))

    async def close(self) -> None:
        """Send what is pending and disconnect.

        Requests without an answer end as `ConnectionLost`.
        """
        await self.background.stop()
        if not self.client.is_closed:
            try:
                if self.client.is_connected and self.client.is_reading:
                    async with asyncio.timeout(2):
                        await self.client.barrier()
            except (nats.errors.Error, TimeoutError, OSError) as error:
                logger.warning("closing the connection to %s: %s", self.servers, error)
            await self._close_client()
        for hook in self.on_close:
            hook()

    def abandon(self) -> None:
        """Disconnect without awaiting anything: the event loop of the connection runs no more."""
        self.client.abandon()

    async def _close_client(self) -> None:
        try:
            await self.client.close()
        except (
            nats.errors.Error,
            OSError,
            RuntimeError,
        ) as error:  # the server went away first; RuntimeError: uvloop's word for it
            logger.debug("closing the connection to %s: %s", self.servers, error)

    def _learn_time(self, stamp: str, sent: float, received: float) -> None:
        """Measure the server's clock by a time stamp; see `ServerClock.learn`."""
        before = self.server_clock.offset
        self.server_clock.learn(parse_time(stamp), sent, received)
        offset = self.server_clock.offset
        wrong = time.time() - time.monotonic() - offset
        if abs(wrong) > 1 and abs(offset - before) > 1:
            logger.warning(
                "the clock of this machine is %.1f s off the clock of the NATS server; "
                "the server's is used",
                wrong,
            )

    # -- requests

    def _on_reply(self, subject: bytes, _: bytes, body: bytes, headers: bytes | None) -> None:
        collector = self._collectors.get(subject[len(self._inbox) :])
        if collector is not None:
            collector(Reply(body, headers))

    async def collect(
        self,
        subject: str,
        body: bytes | Sequence[bytes],
        *,
        timeout: float,
        finished: Callable[[list[Reply]], bool],
        headers: bytes = b"",
        patient: bool = False,
    ) -> list[Reply]:
        """Send a request and return its replies, as soon as `finished` says that they are complete.

        `headers`: as on the wire. `body`: several make as many requests, whose replies come
        together.
        `patient`: go on waiting while the connection stays, for `LONG_CALL_TIMEOUT` at most.

        Raises:
            TimeoutError: they did not become so in time, or the connection was lost meanwhile and
                is there again: repeat it.
            PayloadTooLarge: the server would not take the request.
            PermissionRefused: this user may not send it.
        """
        replies: list[Reply] = []
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Reply) -> None:
            replies.append(reply)
            if finished(replies) and not done.done():
                done.set_result(None)

        token = b"%d" % next(self._tokens)
        for one in (body,) if isinstance(body, bytes) else body:
            self.post(subject, one, self._inbox + token, headers)
        self._collectors[token], self._requests[token] = on_reply, (subject, done)
        # Not `asyncio.timeout`, which takes as long as all the rest of this.
        timer = asyncio.get_running_loop().call_later(timeout, _give_up, done)
        if patient:
            timer.cancel()
            self.background.run(self._watch_long_call(done, timeout))
        try:
            await done
        finally:
            timer.cancel()
            del self._collectors[token], self._requests[token]
        return replies

    def reply_if_unheard(self, on_unheard: Callable[[], None]) -> bytes:
        """Return a reply subject: `on_unheard` is called if no one hears what it is sent with."""
        token = b"%d" % next(self._tokens)

        def on_reply(reply: Reply) -> None:
            if reply.status == "503":
                on_unheard()

        self._collectors[token] = on_reply
        asyncio.get_running_loop().call_later(HEARING, self._collectors.pop, token, None)
        return self._inbox + token

    def call_unheard(self, subject: str, body: bytes) -> None:
        """Call the JetStream API without waiting for its answer, which is dropped."""
        self.client.post((self._api + subject).encode(), body, self._inbox + b"0")

    async def ask_each(
        self, subject: str, bodies: Sequence[bytes], *, timeout: float, under_way: int
    ) -> list[Reply | None]:
        """Send a request for each body, some at a time; return the first reply to each.

        `None` where there is none: the server was silent for `timeout` seconds, or the connection
        was lost meanwhile.

        Raises:
            PermissionRefused: this user may not send them.
        """
        name = b"%d" % next(self._tokens)
        requests = _Requests(bodies, partial(self._send_one, subject, name), under_way)
        self._requests[name] = (subject, requests.done)
        try:
            requests.begin()
            before = -1
            while requests.answered > before and not requests.done.done():
                before = requests.answered
                await asyncio.wait([requests.done], timeout=timeout)
            if requests.done.done():
                with suppress(TimeoutError):  # the connection was lost
                    requests.done.result()
        finally:
            requests.done.cancel()
            del self._requests[name]
            for number in range(len(bodies)):
                self._collectors.pop(b"%b-%d" % (name, number), None)
        return requests.replies

    def _send_one(
        self, subject: str, name: bytes, number: int, body: bytes, settle: Callable[[Reply], None]
    ) -> None:
        token = b"%b-%d" % (name, number)
        self._collectors[token] = settle
        self.post(subject, body, self._inbox + token)

    async def _watch_long_call(self, done: "asyncio.Future[None]", timeout: float) -> None:
        """Give up a call whose connection is lost.

        The server may still be working on it.
        """
        end = time.monotonic() + LONG_CALL_TIMEOUT
        while not done.done():
            await asyncio.wait([done], timeout=timeout)
            if not self.client.is_connected or time.monotonic() > end:
                _give_up(done)

    def too_large(self, subject: str, size: int, reply_size: int = 0) -> PayloadTooLarge:
        """Return the error of a message that the server would end the connection for."""
        most = self.client.max_payload
        if size > most:
            return PayloadTooLarge(f"the message for {subject:.100}", size, most)
        length = len(subject.encode()) + reply_size
        return PayloadTooLarge(f"the subject {subject:.100}", length, MAX_CONTROL_LINE)

    def post(
        self, subject: str, body: bytes = b"", reply: bytes = b"", headers: bytes = b""
    ) -> None:
        """Send a message. `headers`: as on the wire.

        Raises:
            PayloadTooLarge: the server would end the connection for it.
            ConnectionLost, ConnectionFailed: it cannot be sent.
        """
        try:
            self.client.post(subject.encode(), body, reply, headers)
        except nats.errors.MaxPayloadError:
            raise self.too_large(subject, len(headers) + len(body), len(reply)) from None
        except nats.errors.Error as error:
            with mapped_errors(self.servers):
                raise error

    def _interrupt_requests(self) -> None:
        for _, done in self._requests.values():
            _give_up(done)

    def _end_requests(self) -> None:
        for _, done in self._requests.values():
            if not done.done():
                done.set_exception(ConnectionLost(self.servers))

    def _refuse_requests(self, refused: str, text: str) -> None:
        for subject, done in self._requests.values():
            if subject.lower() == refused and not done.done():
                done.set_exception(PermissionRefused(f"publishing to {subject}", text))

    async def call(self, subject: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call the JetStream API and return its answer, errors as the key `error`.

        Repeated for `request_timeout`: calls are idempotent.

        Raises:
            PermissionRefused: the server forbids it.
            ServerUnsuitable: JetStream is off.
            Unconfirmed: no answer came.
        """
        body = b"" if payload is None else json.dumps(payload).encode()
        begun = time.monotonic()
        is_long = subject.startswith(LONG_CALLS)
        deadline = begun + self._settings.request_patience
        tries = silent = 0
        while True:
            left = deadline - time.monotonic()
            sent = time.monotonic()
            # A call that counts what it removes is not repeated soon.
            patience = REQUEST_TIMEOUT if is_long else patience_with(tries)
            tries += 1
            try:
                reply = (
                    await self.collect(
                        self._api + subject,
                        body,
                        timeout=min(patience, max(left, 0.1)),
                        finished=bool,
                        # In a cluster, the server that worked on it may be gone while the
                        # connection stays.
                        patient=is_long and not self.client.is_clustered,
                    )
                )[0]
            except TimeoutError:
                if time.monotonic() >= deadline:
                    what, is_read = f"JetStream API {subject}", subject.startswith(READ_CALLS)
                    patience = self._settings.request_patience
                    raise Unconfirmed(what, patience, read=is_read) from None
                continue
            if reply.status == "503":
                silent += 1
                if silent > 20 or left < 0.2:
                    raise ServerUnsuitable(
                        f"no JetStream answers at {self.servers}",
                        "start nats-server with -js, or enable it for this account",
                    )
                await asyncio.sleep(0.1)
                continue
            received = time.monotonic()
            answer: dict[str, Any] = json.loads(reply.body)
            if "ts" in answer:
                self._learn_time(answer["ts"], sent, received)
            if self._may_pass(answer.get("error", {}), sent - begun) and left > 0.3:
                await asyncio.sleep(0.2)
                continue
            return answer

    def _may_pass(self, error: Mapping[str, Any], waited: float) -> bool:
        """Return whether the error says that a server or a cluster is about to be ready."""
        if error.get("err_code") == NO_PEERS:
            return waited < self._settings.connect_timeout
        if is_full(error):
            return False
        return error.get("code") == 503 and error.get("err_code") not in NO_JETSTREAM

    async def require(
        self, subject: str, payload: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Like `call`, but raise the error of the answer as `BackendError`."""
        answer = await self.call(subject, payload)
        if "error" in answer:
            raise api_error(subject, answer["error"])
        return answer

    # -- callbacks of nats-py: they run outside our tasks and only note things

    async def _on_error(self, error: Exception) -> None:
        refused = REFUSAL.search(str(error))
        if refused is not None:
            for hook in list(self.on_refusal):
                hook(refused[1], str(error))
        if isinstance(error, nats.errors.SlowConsumerError):
            if times := self._slow.note():
                logger.warning("%s: %d messages were lost, their reader is slow", error, times)
        elif self.client.is_connected and not (refused and self.is_probing):
            logger.warning("NATS connection to %s: %s", self.servers, error)

    async def _on_disconnected(self) -> None:
        if not self.client.is_closed:
            logger.warning("disconnected from NATS at %s; reconnecting", self.servers)

    async def _on_reconnected(self) -> None:
        self.reconnects += 1
        logger.info("reconnected to NATS at %s", self.servers)
        for hook in list(self.on_reconnect):
            hook()


class _Requests:
    """Requests of which some are under way at a time, each with one reply.

    `send`: called with a request's number, its body, and what takes the reply.
    """

    def __init__(
        self,
        bodies: Sequence[bytes],
        send: Callable[[int, bytes, Callable[[Reply], None]], None],
        under_way: int,
    ) -> None:
        self.replies: list[Reply | None] = [None] * len(bodies)
        self.answered = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = iter(enumerate(bodies))
        self._send = send
        self._under_way = min(under_way, len(bodies))

    def begin(self) -> None:
        if not self._under_way:
            self.done.set_result(None)
        for _ in range(self._under_way):
            self._send_next()

    def _send_next(self) -> None:
        for number, body in self._left:
            self._send(number, body, partial(self._settle, number))
            return

    def _settle(self, number: int, reply: Reply) -> None:
        if self.done.done() or self.replies[number] is not None:
            return
        self.replies[number] = reply
        self.answered += 1
        if self.answered == len(self.replies):
            self.done.set_result(None)
            return
        try:
            self._send_next()
        except BackendError as error:
            self.done.set_exception(error)


def patience_with(tries: int) -> float:
    """Return how long to wait for the next answer: longer in a cluster, which may be slow."""
    return min(2.0**tries, REQUEST_TIMEOUT)


def _give_up(done: "asyncio.Future[None]") -> None:
    if not done.done():
        done.set_exception(TimeoutError())


class Background:
    """Tasks that serve a connection until `stop`: a task group without a block of code around it.

    nats-py's callbacks run outside any group, and a backend has no `async with`; so the owner is
    this object.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Run the work and log its exceptions. Drop it after `stop`."""
        if self._stopped:
            work.close()
            return None
        task = asyncio.ensure_future(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # if it was stopped before it began
        return task

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except BackendError as error:
            logger.warning("background work of the NATS backend: %s", error)
        except Exception:
            logger.exception("background work of the NATS backend failed")

    async def stop(self) -> None:
        """Cancel what runs and wait for it."""
        self._stopped = True
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)


def format_time(at: float) -> str:
    """Return Unix seconds as the server writes times."""
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def parse_time(stamp: str) -> float:
    """Return an RFC 3339 time stamp of the server (nanoseconds, `Z`) as Unix seconds."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return _parse_second(whole) + (float("0." + fraction) if fraction else 0.0)


@lru_cache(maxsize=128)  # most records of a page are of the same few seconds
def _parse_second(whole: str) -> float:
    return datetime.fromisoformat(whole + "+00:00").timestamp()
