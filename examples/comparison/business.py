"""The work of the application besides queueing.

It is the same for all three, and is not counted.
"""


class Bank:
    """A bank that is down for the next `down` charges."""

    down = 0
    charged: dict[str, int] = {}

    @classmethod
    def charge(cls, order: str, cents: int) -> None:
        if cls.down > 0:
            cls.down -= 1
            raise ConnectionError("the bank does not answer")
        cls.charged[order] = cents


class Mailbox:
    """The mails that were sent."""

    sent: list[str] = []


def reset() -> None:
    Bank.down, Bank.charged, Mailbox.sent = 0, {}, []
