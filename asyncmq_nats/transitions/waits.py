"""Children with many parents: the parents that are still open are kept in parts beside the child.

A child with few parents lists them in its own record, which each parent rewrites. With many, that
would cost as much per parent as there are parents. So they are kept in the records
`wait.<child>.<token>.<number>`, up to 64 in each, and `wait.<child>.<token>.top` lists the parts
that are not empty. A parent rewrites its part; the last one of a part rewrites the top. The token
is random: what an earlier job of the same id left behind is not taken for these parts.

They are rewritten `beside` the older record, which is cheaper: one that comes back after a crash of
the server is of a child that has gone on.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from asyncmq_nats._concurrency import KeyedTurns
from asyncmq_nats.backends.base import Expect, Record, Write
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import State
from asyncmq_nats.store.commit import commit
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import without_markers
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import encode_token

__all__ = [
    "NARROW_LIMIT",
    "Parent",
    "Wait",
    "Waits",
    "new_wide",
    "place_of",
    "places_of",
    "texts",
]

NARROW_LIMIT: Final = 64
"""Open parents that one record keeps."""
WIDE_PATTERN: Final = re.compile(r"([0-9a-f]{8})\.([1-9][0-9]{0,4})")
PART_PATTERN: Final = re.compile(r"[0-9a-f]{8}\.[0-9]{1,5}")
TOP: Final = "top"


@dataclass(frozen=True, slots=True)
class Parent:
    """A parent as its children see it."""

    id: str
    state: State | None
    """Its outcome; `None` while it has none."""
    result: Any = None
    last: int = 0
    """Sequence of the last record about its end that was read."""
    outcome: str = ""
    """Key of its outcome."""

    @property
    def completed(self) -> bool:
        """Whether it has ended well."""
        return self.state is State.COMPLETED


class Wait(Enum):
    """The effect of a parent's end on a child with many parents."""

    GONE = auto()
    """The child waits no more."""
    OPEN = auto()
    """It waits for others, or for this parent to be retried."""
    FAILS = auto()
    """It wants to fail."""
    CLOSED = auto()
    """This was the last parent."""


def texts(value: object) -> list[str]:
    """Return the texts in a list; of junk none."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def new_wide(parents: int) -> str:
    """Return a new value of `Job.wide` for this many parents."""
    return f"{os.urandom(4).hex()}.{-(-parents // NARROW_LIMIT)}"


def place_of(value: object) -> str:
    """Return the value if it names a part, `<token>.<number>`; else nothing."""
    return value if isinstance(value, str) and PART_PATTERN.fullmatch(value) else ""


def places_of(job: Job) -> dict[str, str]:
    """Return the part of each parent of a job; none if it has few parents.

    Neighbours are in different parts: parents that end at the same time do not meet.
    """
    match = WIDE_PATTERN.fullmatch(job.wide)
    if match is None:
        return {}
    token, count = match[1], int(match[2])
    return {
        parent: f"{token}.{index % count}"
        for index, parent in enumerate(dict.fromkeys(job.depends_on or ()))
    }


class Waits:
    """The parts of one queue."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._keys = store.keys
        self._turns = KeyedTurns()

    def writes(self, job: Job) -> list[Write]:
        """Return the writes of the parts of a job with many open `parents`, the top last."""
        places = places_of(job)
        if not places:
            return []
        token, child = job.wide.partition(".")[0], encode_token(job.job_id)
        parts: dict[str, list[str]] = {place: [] for place in places.values()}
        for parent in job.parents:
            parts[places[parent]].append(parent)
        bodies: dict[str, dict[str, Any]] = {
            place: {"open": parents, "parts": len(parts), "policy": job.on_parent_failure}
            for place, parents in parts.items()
        }
        top = [int(place.partition(".")[2]) for place, parents in parts.items() if parents]
        bodies[f"{token}.{TOP}"] = {"open": top, "parts": len(parts)}
        return [
            Write(key := self._keys.wait(child, place), dump_json(body), Expect(key, 0))
            for place, body in bodies.items()
        ]

    async def store(self, job: Job) -> None:
        """Store the parts of a job, but for those that are there."""

        async def write(each: Write) -> None:  # refused: an earlier try stored it
            await self._store.write_if_expected(each)

        *parts, top = self.writes(job)
        await for_each(write, parts)
        await write(top)

    async def take_out(
        self, child: str, place: str, parent: Parent, *, stored: bool = False
    ) -> Wait:
        """Take a parent that has ended out of its part. Repeatable.

        `stored`: the caller has just stored the part. A replica without it lags behind.
        """
        key = self._keys.wait(child, place)
        needed = {parent.outcome}
        if stored and self._store.backend.reads_may_lag:
            needed.add(key)

        async def take() -> Wait | Record:
            """Return the part without that parent, or why it is not taken out."""
            records = await self._store.last_when(
                lambda found: needed <= {record.subject for record in found},
                parent.outcome,
                key,
            )
            record = next((each for each in records if each.subject == key), None)
            part = None if record is None else _read(record)
            if record is None or part is None:
                return Wait.GONE
            if parent.id not in texts(part.get("open")):
                return record
            if not parent.completed and part.get("policy") != "run":
                return Wait.FAILS if part.get("policy") == "fail" else Wait.OPEN
            body = dump_json(self._without(part, parent))
            write = Write(key, body, Expect(key, record.sequence), beside=True)
            return Record(key, body, await self._store.write(write), 0.0)

        async with self._turns.of(key):
            part = await commit(take)
        if isinstance(part, Wait):
            return part
        return Wait.OPEN if (_read(part) or {}).get("open") else await self._close(child, part)

    def _without(self, part: dict[str, Any], parent: Parent) -> dict[str, Any]:
        results = part.get("results")
        results = dict(results) if isinstance(results, dict) else {}
        share = self._store.backend.max_body // 2 // max(1, _count(part))
        if parent.completed and len(dump_json([results, parent.result])) < share:
            results[parent.id] = parent.result
        left = [other for other in texts(part.get("open")) if other != parent.id]
        return part | {"open": left, "results": results}

    async def _close(self, child: str, part: Record) -> Wait:
        """Take an empty part out of the top."""
        token, number = self._keys.split_wait(part.subject)
        key = self._keys.wait(child, f"{token}.{TOP}")

        async def close() -> Wait:
            records = await self._store.last_when(
                lambda found: any(
                    each.subject == part.subject and each.sequence >= part.sequence
                    for each in found
                ),
                part.subject,
                key,
            )
            record = next((each for each in records if each.subject == key), None)
            top = None if record is None else _read(record)
            if record is None or top is None:
                return Wait.GONE
            left = [each for each in _numbers(top) if each != int(number)]
            if left != _numbers(top):
                body = dump_json(top | {"open": left})
                write = Write(key, body, Expect(key, record.sequence), beside=True)
                await self._store.write(write)
            return Wait.OPEN if left else Wait.CLOSED

        async with self._turns.of(key):
            return await commit(close)

    async def is_closed(self, child: str, wide: str) -> bool:
        """Return whether no parent of the child is open any more."""
        key = self._keys.wait(child, f"{wide.partition('.')[0]}.{TOP}")
        records = await self._store.last(key)
        top = _read(records[0]) if records else None
        return top is not None and not _numbers(top)

    async def open_parents(self, child: str, wide: str) -> set[str]:
        """Return the parents that are in the parts of a child."""
        parts = await self._read_parts(child, wide)
        return {parent for part in parts for parent in texts(part.get("open"))}

    async def results(self, child: str, wide: str) -> dict[str, Any]:
        """Return the results of parents that are in the parts of a child."""
        gathered: dict[str, Any] = {}
        for part in await self._read_parts(child, wide):
            if isinstance(part.get("results"), dict):
                gathered |= part["results"]
        return gathered

    async def _read_parts(self, child: str, wide: str) -> list[Mapping[str, Any]]:
        match = WIDE_PATTERN.fullmatch(wide)
        if match is None:
            return []
        keys = [self._keys.wait(child, f"{match[1]}.{number}") for number in range(int(match[2]))]
        records = await self._store.last_of_many(keys)
        return [part for record in records if (part := _read(record)) is not None]

    async def remove(self, child: str) -> None:
        """Remove all parts of a child that does not wait any more."""
        await self._store.purge(self._keys.wait_all(child))

    async def remove_orphans(self) -> None:
        """Remove the parts of children that are not waiting any more.

        Costs as much as there are.
        """
        subjects = await self._store.backend.list_subjects(
            self._keys.bucket_log, self._keys.wait_all("*")
        )
        children = {self._keys.token(subject) for subject in subjects}
        filters = [self._keys.later_all(child) for child in children]
        records = await self._store.last_of_many(filters)
        waiting = {self._keys.token(record.subject) for record in without_markers(records)}
        await for_each(self.remove, sorted(children - waiting))


def _read(record: Record) -> dict[str, Any] | None:
    if record.marker:
        return None
    try:
        return load_json(record.body)
    except InvalidJob:
        return None


def _numbers(top: Mapping[str, Any]) -> list[int]:
    value = top.get("open")
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []


def _count(part: Mapping[str, Any]) -> int:
    count = part.get("parts")
    return count if isinstance(count, int) else 1
