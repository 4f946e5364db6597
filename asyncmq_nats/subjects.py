"""Every subject, key, asset name and header, spelled once. The reference for other languages is `docs/protocol.md`."""

import re
from typing import Final

from asyncmq_nats.exceptions import InvalidQueueName
from asyncmq_nats.states import State

__all__ = ["QueueSubjects", "decode_token", "encode_token"]

QUEUE_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
UNSAFE: Final = re.compile(r"[\s.*>%\x00-\x1f\x7f]")
ESCAPED: Final = re.compile(r"%([0-9A-F]{2})")
PROMOTER: Final = "promoter"
TIER: Final = "tier_"


def encode_token(text: str) -> str:
    """Return the text as one subject token: `.`, `*`, `>`, `%`, white space and control characters percent-encoded as UTF-8."""
    if UNSAFE.search(text) is None:
        return text
    return UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), text)


def decode_token(token: str) -> str:
    """Return the text that `encode_token` made the token from."""
    if "%" not in token:
        return token
    raw = ESCAPED.sub(lambda match: chr(int(match[1], 16)), token)
    try:
        return raw.encode("latin-1").decode() if ESCAPED.search(token) else token
    except UnicodeError:
        return raw
