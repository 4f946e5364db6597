"""Orders, and the jobs that they need, in one transaction.

Needs the extra `outbox`, and a server in ASYNCMQ_NATS_SERVERS. python examples/outbox.py

The database is a file of SQLite here. A real application leaves the relay to `asyncmq-nats outbox
relay`.
"""

import sys
import tempfile
from pathlib import Path

import anyio
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asyncmq_nats import AsyncMQError, Queue, Worker, task
from asyncmq_nats.contrib import outbox


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    number: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]


@task(queue="shop", retries=5)
async def send_receipt(number: int, customer: str) -> str:
    print(f"  receipt of order {number} for {customer}")
    return f"receipt {number}"


@task(queue="shop")
async def update_balance(customer: str, step: int) -> None:
    print(f"  balance of {customer}, step {step}")


async def place_order(session: AsyncSession, customer: str) -> str:
    order = Order(customer=customer)
    session.add(order)
    await session.flush()  # now it has a number
    return outbox.add(session, send_receipt, [order.number, customer])


async def place_orders(sessions: async_sessionmaker[AsyncSession]) -> list[str]:
    async with sessions.begin() as session:
        jobs = [await place_order(session, customer) for customer in ("ada", "bob")]
    try:
        async with sessions.begin() as session:
            await place_order(session, "eve")
            raise ValueError("the card is refused")
    except ValueError as error:
        print(f"no order and no job for eve: {error}")
    async with sessions.begin() as session:
        for step in (1, 2, 3):
            job_id = outbox.add(session, update_balance, ["ada", step], order_key="ada")
            jobs.append(job_id)
    return jobs


async def main(directory: str) -> None:
    database = f"sqlite+aiosqlite:///{Path(directory) / 'shop.db'}"
    engine = create_async_engine(database)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.run_sync(outbox.metadata.create_all)
    jobs = await place_orders(async_sessionmaker(engine))
    await engine.dispose()
    print(f"{len(jobs)} jobs written")

    queue = Queue("shop")
    async with anyio.create_task_group() as group:
        await group.start(outbox.Relay(database).run)
        worker = Worker(queue)
        await group.start(worker.run)
        for job_id in jobs:
            await queue.wait_for(job_id, timeout=30)
        worker.stop()
        group.cancel_scope.cancel()
    print(f"{len(jobs)} jobs done")


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as temporary:
            anyio.run(main, temporary)
    except* AsyncMQError as errors:
        sys.exit(str(errors.exceptions[0]))
