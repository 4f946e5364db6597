"""A parser of NATS's protocol that hands whole messages to functions.

It copies nothing of what follows a message, and makes no coroutine.

nats-py's cuts every message off the front of its buffer twice, after matching up to seven
expressions. Here what was read is looked through once. All that is no message stays nats-py's
business.
"""

from collections.abc import Callable, Mapping
from typing import Final

from nats.aio.client import Client
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

__all__ = ["DirectParser", "Handler"]

LINE_END: Final = b"\r\n"
MESSAGES: Final = (b"MSG", b"HMSG")

Handler = Callable[[bytes, bytes, bytes, bytes | None], None]
"""Called with subject, reply subject, body and raw headers. Must not block or raise."""


class DirectParser(Parser):
    """The parser of one client.

    `handlers`: who takes the messages of a subscription, by its number; the others are the
    client's.
    """

    def __init__(self, client: Client, handlers: Mapping[int, Handler]) -> None:
        self._handlers = handlers
        self._resets = 0
        super().__init__(client)

    def reset(self) -> None:
        """Drop the buffer: the connection is gone."""
        super().reset()
        self._resets += 1

    # Written out: each call in it costs a hundredth of a small job.
    async def parse(self, data: bytes = b"") -> None:  # noqa: C901
        """Take in what was read.

        `buf` keeps the incomplete rest, `needed` the length at which to parse it.
        """
        if self.buf:
            self.buf += data
            if len(self.buf) < self.needed:
                return
            data = bytes(self.buf)
        self.needed, resets, at = 0, self._resets, 0
        length, handlers = len(data), self._handlers
        while (end := data.find(LINE_END, at)) >= 0:
            # Not `split()`, which takes twice as long: the server sends one blank.
            words = data[at:end].split(b" ")
            if words[0] not in MESSAGES:
                await self._parse_line(data[at : end + 2])
                at = end + 2
            else:
                try:
                    number, size = int(words[2]), int(words[-1])
                    header_size = int(words[-2]) if words[0] == b"HMSG" else 0
                except (ValueError, IndexError):
                    raise ProtocolError("nats: malformed MSG") from None
                start = end + 2
                stop = start + size
                if stop + 2 > length:
                    self.needed = stop + 2 - at
                    break
                at = stop + 2
                reply = words[3] if len(words) == (6 if header_size else 5) else b""
                headers = data[start : start + header_size] if header_size else None
                body = data[start + header_size : stop]
                if (handler := handlers.get(number)) is not None:
                    handler(words[1], reply, body, headers)
                    continue
                await self.nc._process_msg(number, words[1], reply, body, headers)
            if resets != self._resets:
                return
        self.buf = bytearray(data[at:])

    async def _parse_line(self, line: bytes) -> None:
        self.buf = bytearray(line)
        await super().parse()
        if self.buf:
            raise ProtocolError("nats: unknown protocol")
