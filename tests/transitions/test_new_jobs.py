"""Jobs with the same options: checked and encoded once, and like those that were made alone."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import RFC_4122, UUID

import pytest

from asyncmq_nats import _arguments
from asyncmq_nats._arguments import Templates, build_addition
from asyncmq_nats._new_jobs import NewJob, whole_job
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument, NotSerializable
from asyncmq_nats.jobs import LATEST_TIME, Backoff, Job, new_job_id
from asyncmq_nats.middleware import AddJobs, Middleware
from asyncmq_nats.queues import Queue
from asyncmq_nats.transitions.bulk import EntryBuilder
from tests.running import make_queue, only

NOW = 1_700_000_000.125


@pytest.fixture(autouse=True)
def _forget_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arguments, "_templates", Templates())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"retries": 3, "ttl": 60, "timeout": 1.5, "priority": -7},
    {"backoff": 2},
    {"backoff": Backoff(kind="fixed", delay=3)},
    {"delay": 5},
    {"delay": -1, "meta": {}},
    {"meta": {"trace": 'a"ö'}, "delay": 0.5},
    {"job_id": 'a "quoted" one'},
    {"repeat_every": "5m", "on_parent_failure": "run"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_job_like_an_earlier_one_is_as_if_it_were_the_first(options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"task_id": "mail", "args": [1, "a"], "kwargs": {"b": None}} | options
    first, *others = (build_addition(NOW, **given) for _ in range(3))
    assert isinstance(first, Job)
    second = others[-1]
    assert all(isinstance(each, NewJob) for each in others)
    assert isinstance(second, NewJob)
    body = json.loads(second.encode())
    assert body | {"id": ""} == json.loads(first.encode()) | {"id": ""}
    assert body["id"] == second.job_id
    assert Job.decode(second.encode()) == whole_job(second)
    assert vars(whole_job(second)).keys() == vars(first).keys() - {"_encoded"}
    assert not first.depends_on
    assert not second.depends_on
    for name in ("task_id", "priority", "custom_id", "delay_until"):
        assert getattr(first, name) == getattr(second, name)


def test_whole_jobs_share_nothing_that_can_be_changed() -> None:
    build_addition(NOW, task_id="mail")
    one, other = (whole_job(build_addition(NOW, task_id="mail")) for _ in range(2))
    for name, value in vars(one).items():
        if isinstance(value, list | dict):
            assert value is not getattr(other, name), name


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("repeat_every", 1, True), ("repeat_every", 1.0, True), ("retries", 1, [1]), ("ttl", 1, "x")],
)
def test_what_is_only_equal_to_a_valid_option_is_checked(name: str, good: Any, bad: Any) -> None:
    for _ in range(2):
        build_addition(NOW, task_id="mail", **{name: good})
        with pytest.raises((TypeError, ValueError)):
            build_addition(NOW, task_id="mail", **{name: bad})


def test_a_job_too_late_for_the_format_is_refused_also_with_known_options() -> None:
    for _ in range(2):
        build_addition(NOW, task_id="mail")
    with pytest.raises(InvalidArgument, match="delay"):
        build_addition(NOW, task_id="mail", delay=LATEST_TIME)


def test_only_some_kinds_of_jobs_are_remembered() -> None:
    for number in range(3 * _arguments.TEMPLATES_KEPT):
        build_addition(NOW, task_id="mail", ttl=number)
    assert len(_arguments._templates._known) <= _arguments.TEMPLATES_KEPT


def test_ids_are_uuids_that_begin_with_the_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_job_id() for _ in range(200)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == len({job_id[14:] for job_id in ids}) == 200
    for job_id in ids:
        uuid = UUID(job_id)
        assert (str(uuid), uuid.version, uuid.variant) == (job_id, 7, RFC_4122)
        assert before <= uuid.int >> 80 <= after
    for place in set(range(15, 36)) - {18, 19, 23}:  # all other digits are random
        assert len({job_id[place] for job_id in ids}) > 8


def test_a_process_and_its_fork_make_ids_of_their_own() -> None:
    script = """
import os
from asyncmq_nats.jobs import new_job_id
new_job_id()
child = os.fork()
os.write(1, new_job_id()[14:].encode() + b" ")
if child:
    os.wait()
"""
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(set(ran.stdout.split())) == 2


def test_ids_are_made_also_where_no_process_forks() -> None:
    """As on Windows."""
    script = """
import os, random
del os.register_at_fork
from asyncmq_nats.jobs import new_job_id
print(new_job_id())
"""
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert UUID(ran.stdout.strip()).version == 7


# -- entries of a bulk


def bulk(*entries: Mapping[str, Any]) -> list[Job]:
    return built(entries)


def built(entries: Iterable[Mapping[str, Any]]) -> list[Job]:
    builder = EntryBuilder(NOW)
    return [whole_job(builder.build(*each)) for each in enumerate(entries)]


def test_entries_with_the_options_of_the_last_one_differ_in_id_and_arguments() -> None:
    entries = [{"task_id": "mail", "args": [n], "kwargs": {"n": n}, "ttl": 5} for n in range(3)]
    jobs = bulk(*entries, {"task_id": "call", "args": [3]}, *entries)
    assert [job.args[0] for job in jobs] == [0, 1, 2, 3, 0, 1, 2]
    assert [job.kwargs.get("n") for job in jobs] == [0, 1, 2, None, 0, 1, 2]
    assert [job.ttl for job in jobs] == [5, 5, 5, None, 5, 5, 5]
    assert len({job.job_id for job in jobs}) == 7


def test_an_entry_that_is_changed_and_given_again_counts_as_it_is_then() -> None:
    def entries() -> Iterator[dict[str, Any]]:
        entry: dict[str, Any] = {"task_id": "mail", "args": [0], "meta": {"n": "0"}}
        for n in range(3):
            entry["args"][0], entry["meta"]["n"], entry["ttl"] = n, str(n), n + 1
            yield entry

    jobs = built(entries())
    assert [(job.args, job.meta, job.ttl) for job in jobs] == [
        ([n], {"n": str(n)}, n + 1) for n in range(3)
    ]


def test_ids_and_parents_are_not_those_of_the_entry_before() -> None:
    jobs = bulk(
        {"task_id": "mail", "jobId": "a"},
        {"task_id": "mail", "jobId": None},
        {"task_id": "mail", "job_id": "b"},
        {"task_id": "mail", "depends_on": "b"},
        {"task_id": "mail"},
        {"task_id": "mail", "job_id": "c"},
    )
    assert [job.custom_id for job in jobs] == [True, False, True, False, False, True]
    assert [job.depends_on for job in jobs] == [[], [], [], ["b"], [], []]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"args": [1]}, ValueError),
        ({"task_id": "mail", "args": "text"}, InvalidArgument),
        ({"task_id": "mail", "kwargs": {5: 1}}, InvalidArgument),
        ({"task_id": "mail", "retries": True, "repeat_every": True}, TypeError),
        ({"task_id": "mail", "args": [object()]}, NotSerializable),
        ({"task_id": "mail", "args": [float("nan")]}, NotSerializable),
        ({"task_id": "mail", "args": [10**5000]}, NotSerializable),
    ],
)
async def test_a_bad_entry_after_good_ones_adds_nothing(
    backend: Backend, bad: dict[str, Any], error: type[Exception]
) -> None:
    queue = make_queue(backend)
    good = {"task_id": "mail", "args": [1]}
    with pytest.raises(error) as caught:
        await queue.add_bulk([good, good, bad, good])
    told = f"{caught.value} {getattr(caught.value, '__notes__', '')}"
    assert "job 2" in told
    await only(queue)


class Marking(Middleware):
    """Sees whole jobs, and changes them."""

    async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
        assert all(isinstance(job, Job) for job in jobs)
        return await add([replace(job, args=[*job.args, "seen"]) for job in jobs])


async def test_middleware_is_given_whole_jobs(backend: Backend) -> None:
    queue = Queue("work", backend, middleware=[Marking()])
    ids = await queue.add_bulk([{"task_id": "mail", "args": [n]} for n in range(3)])
    ids += [await queue.add("mail", [n]) for n in range(3, 5)]
    jobs = [await queue.get_job(job_id) for job_id in ids]
    assert [job and job["args"] for job in jobs] == [[n, "seen"] for n in range(5)]
