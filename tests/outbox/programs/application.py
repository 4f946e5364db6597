"""An application that takes orders until there are `ORDERS`: each with its jobs in one transaction.

Some are rolled back. It takes the last ones when the file `MAY_END` is there.
"""

import os
import time
from pathlib import Path

from sqlalchemy import Integer, String, create_engine, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from asyncmq_nats.contrib import outbox

CUSTOMERS = 5


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[str] = mapped_column(String(64))
    order_key: Mapped[str | None] = mapped_column(String(64))


def main() -> None:
    engine = create_engine(os.environ["DATABASE"])
    if engine.dialect.name == "sqlite":
        with engine.begin() as connection:
            connection.execute(text("PRAGMA busy_timeout=30000"))
    Base.metadata.create_all(engine)
    keyed = int(os.environ.get("KEYED", "0"))
    with Session(engine) as session:
        count = session.scalar(select(func.count()).select_from(Order)) or 0
        session.rollback()
        print("takes orders", flush=True)
        orders, may_end = int(os.environ["ORDERS"]), Path(os.environ["MAY_END"])
        while count < orders:
            if count >= orders - 10 and not may_end.exists():
                time.sleep(0.01)
                continue
            for _ in range(5):
                key = f"customer {count % CUSTOMERS}" if keyed and count % keyed == 0 else None
                job_id = outbox.add(session, "note", [count], queue="orders", order_key=key)
                session.add(Order(job_id=job_id, order_key=key))
                session.flush()
                count += 1
            if count % 50 == 0:  # a customer who has thought better of it
                outbox.add(session, "note", ["never"], queue="orders")
                session.rollback()
                count -= 5
                for _ in range(5):
                    job_id = outbox.add(session, "note", [count], queue="orders")
                    session.add(Order(job_id=job_id))
                    count += 1
            session.commit()
            time.sleep(0.01)  # so that there is time to be killed


if __name__ == "__main__":
    main()
