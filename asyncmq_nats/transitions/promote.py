"""The rule by which a released job becomes ready."""

import hmac
from hashlib import sha256

__all__ = ["promotion_id"]


def promotion_id(secret: bytes, sequence: int, time: float) -> str:
    """Return the message id of the promotion of a record: no stranger can take it before."""
    return hmac.new(secret, f"{sequence}.{time}".encode(), sha256).hexdigest()[:32]
