"""A producer in any language that is cut off while its job runs."""

import os
from pathlib import Path

import anyio

from asyncmq_nats import Queue
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from tests.nats.relay import relaying
from tests.receiver import PATIENCE
from tests.running import only, running


async def follow_untold(
    command: list[str],
    variable: str,
    queue: Queue,
    server: EmbeddedServer,
    *,
    cwd: Path | None = None,
) -> list[str]:
    """Run a producer of one job, lose what it is told of the job's end, and return what it printed.

    `variable`: the variable of its environment with the address of the server. The queue has the
    task, and no worker when the job is added.
    """
    async with running(queue):
        pass  # it declares the queue
    async with relaying(server) as relay:
        environment = os.environ | {variable: relay.url}
        async with await anyio.open_process(command, cwd=cwd, env=environment) as process:
            assert process.stdout is not None
            with anyio.fail_after(PATIENCE):
                printed = b""
                while not printed.startswith(b"added "):
                    printed += await process.stdout.receive()
                relay.lost.set()
                async with running(queue):
                    await only(queue, completed=1)
                await relay.cut()
                async for more in process.stdout:
                    printed += more
                assert await process.wait() == 0
    return printed.decode().splitlines()
