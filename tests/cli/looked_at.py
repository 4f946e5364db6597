"""The task that `job run` is tried with: `tests/cli/test_looking.py`."""

from asyncmq_nats import task


@task(queue="mail", name="work")
async def work(fails: bool = False) -> str:
    """Do what the job in the queue did."""
    return "done"
