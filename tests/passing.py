"""Time passes in a test: for real, or by the virtual clock of its backend."""

from asyncio import sleep

from asyncmq_nats.testing import VirtualClock

__all__ = ["clocks", "pass_time"]

clocks: list[VirtualClock] = []
"""The clock of the test that runs, if its backend has a virtual one."""


async def pass_time(seconds: float) -> None:
    """Let `seconds` pass, on the virtual clock if there is one."""
    if clocks:
        await clocks[-1].advance(seconds)
    else:
        await sleep(seconds)
