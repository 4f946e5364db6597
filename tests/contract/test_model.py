"""Random programs, run on both backends and on a model of a few lines.

What a user can see is the same after every step.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.settings import Settings
from asyncmq_nats.states import State
from tests.receiver import until
from tests.running import make_queue, only, running

HOUR = 3600.0
ENDED_BADLY = (State.FAILED, State.EXPIRED, State.CANCELLED)


@dataclass(frozen=True)
class Plan:
    """One job to be added. `task`: what becomes of it when it runs."""

    task: str
    retries: int = 0
    priority: int = 5
    expires: bool = False
    delayed: bool = False
    job_id: str | None = None

    def entry(self, token: int) -> dict[str, Any]:
        """Return the arguments for `add`."""
        return {
            "task_id": self.task,
            "args": [token],
            "retries": self.retries,
            "priority": self.priority,
            "ttl": 0 if self.expires else None,
            "delay": HOUR if self.delayed else None,
            "job_id": self.job_id,
        }


Step = tuple[str, Any]
PLANS = st.builds(
    Plan,
    st.sampled_from(["succeed", "fail", "alternate", "give_nan", "unknown"]),
    retries=st.integers(0, 2),
    priority=st.sampled_from([5, 5, 1, -2]),
    expires=st.sampled_from([False, False, False, True]),
    delayed=st.sampled_from([False, False, True]),
    job_id=st.sampled_from([None, None, "a", "b.c"]),
)
STEPS: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("add"), PLANS),
    st.tuples(st.just("add_bulk"), st.lists(PLANS, max_size=5)),
    st.tuples(st.just("run"), st.none()),
    st.tuples(st.sampled_from(["retry_job", "remove_delayed", "cancel_job"]), st.integers(0, 9)),
)


@dataclass
class ModelJob:
    """A job in the model.

    `attempts` counts those since it was new, or made new by hand.
    """

    plan: Plan
    token: int
    state: State
    attempts: int = 0
    result: Any = None


@dataclass
class Model:
    """A queue as a user sees it."""

    jobs: dict[str, ModelJob] = field(default_factory=dict)
    runs: dict[int, int] = field(default_factory=dict)

    def add(self, job_id: str, plan: Plan, token: int) -> None:
        if job_id not in self.jobs:
            self.jobs[job_id] = ModelJob(
                plan, token, State.DELAYED if plan.delayed else State.WAITING
            )

    def run(self) -> None:
        for job in self.jobs.values():
            while job.state is State.WAITING:
                self._run_once(job)

    def _run_once(self, job: ModelJob) -> None:
        if job.plan.expires:
            job.state = State.EXPIRED
            return
        if job.plan.task != "unknown":
            self.runs[job.token] = self.runs.get(job.token, 0) + 1
        if job.plan.task == "succeed" or (
            job.plan.task == "alternate" and self.runs[job.token] % 2 == 0
        ):
            job.state, job.result = State.COMPLETED, job.token
            return
        job.attempts += 1
        if job.attempts > job.plan.retries or job.plan.task in (
            "give_nan",
            "unknown",
        ):  # another attempt would come to the same
            job.state = State.FAILED

    def count(self) -> dict[str, int]:
        return {
            str(state): sum(job.state is state for job in self.jobs.values()) for state in State
        }

    def retry_job(self, job_id: str) -> bool:
        job = self.jobs.get(job_id)
        if job is None or job.state not in (*ENDED_BADLY, State.DELAYED):
            return False
        job.state, job.attempts = State.WAITING, 0
        return True

    def remove_delayed(self, job_id: str) -> bool:
        if job_id not in self.jobs or self.jobs[job_id].state is not State.DELAYED:
            return False
        del self.jobs[job_id]
        return True

    def cancel_job(self, job_id: str) -> bool:
        job = self.jobs.get(job_id)
        if job is None or job.state not in (State.WAITING, State.DELAYED):
            return False
        job.state = State.CANCELLED
        return True


class Program:
    """Runs the steps on a queue and on the model, and compares."""

    def __init__(self, backend: Backend, name: str) -> None:
        self.model = Model()
        self.runs: dict[int, int] = {}
        self.tokens = count()
        self.known: list[str] = []
        self.queue = make_queue(
            backend,
            name,
            concurrency=4,
            succeed=self._succeed,
            fail=self._fail,
            alternate=self._alternate,
            give_nan=self._give_nan,
        )

    def _note(self, token: int) -> int:
        self.runs[token] = self.runs.get(token, 0) + 1
        return self.runs[token]

    async def _succeed(self, token: int) -> int:
        self._note(token)
        return token

    async def _fail(self, token: int) -> None:
        raise ValueError(f"run {self._note(token)}")

    def _alternate(self, token: int) -> int:
        if self._note(token) % 2:
            raise ValueError("next time")
        return token

    async def _give_nan(self, token: int) -> float:
        self._note(token)
        return float("nan")

    async def step(self, what: str, argument: Any) -> None:
        if what == "add":
            await self._add([argument], bulk=False)
        elif what == "add_bulk":
            await self._add(argument, bulk=True)
        elif what == "run":
            self.model.run()
            async with running(self.queue):
                await until(self.queue.queue_stats, lambda stats: stats == self.model.count())
        elif self.known:
            job_id = self.known[argument % len(self.known)]
            assert await self._by_hand(what)(job_id) == getattr(self.model, what)(job_id), (
                what,
                job_id,
            )

    def _by_hand(self, what: str) -> Callable[[str], Awaitable[bool]]:
        method: Callable[[str], Awaitable[bool]] = getattr(self.queue, what)
        return method

    async def _add(self, plans: list[Plan], *, bulk: bool) -> None:
        tokens = [next(self.tokens) for _ in plans]
        entries = [plan.entry(token) for plan, token in zip(plans, tokens, strict=True)]
        ids = await self.queue.add_bulk(entries) if bulk else [await self.queue.add(**entries[0])]
        for job_id, plan, token in zip(ids, plans, tokens, strict=True):
            assert plan.job_id in (None, job_id)
            self.model.add(job_id, replace(plan, job_id=job_id), token)
            self.known.append(job_id)

    async def compare(self) -> None:
        jobs, queue = self.model.jobs, self.queue
        counts = self.model.count()
        await only(queue, **counts)
        assert await queue.count() == counts["waiting"] + counts["delayed"]
        for state in State:
            assert sorted(job["id"] for job in await queue.list_jobs(state)) == sorted(
                i for i, job in jobs.items() if job.state is state
            )
        seen = {job["id"]: job for job in await queue.get_jobs()}
        assert seen.keys() == jobs.keys()
        for job_id in set(self.known):
            expected = jobs.get(job_id)
            found = await queue.get_job(job_id)
            assert (found is None) == (expected is None)
            if expected is not None and found is not None:
                assert _shown(found) == _shown(seen[job_id]) == _expected(expected)
        assert self.runs == self.model.runs


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    return {
        name: job[name]
        for name in ("task", "args", "status", "result", "retries", "max_retries", "priority")
    }


def _expected(job: ModelJob) -> dict[str, Any]:
    return {
        "task": job.plan.task,
        "args": [job.token],
        "status": job.state,
        "result": job.result,
        "retries": job.attempts,
        "max_retries": job.plan.retries,
        "priority": job.plan.priority,
    }


names = count()
PROGRAMS = st.lists(STEPS, min_size=1, max_size=20)
# Programs are short enough to be read as they are, and a failing one waits: to shrink it would take
# minutes.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


async def run_program(backend: Backend, steps: list[Step]) -> None:
    await backend.connect()
    try:
        program = Program(backend, f"program{next(names)}")
        for what, argument in [*steps, ("run", None)]:
            await program.step(what, argument)
            await program.compare()
    finally:
        await backend.close()


@pytest.mark.slow
@settings(max_examples=100, phases=PHASES)
@given(steps=PROGRAMS)
def test_what_a_user_sees_in_memory_is_what_the_model_says(steps: list[Step]) -> None:
    anyio.run(run_program, InMemoryBackend(Settings(unknown_task_timeout=0)), steps)


@pytest.mark.slow
@settings(
    max_examples=25, phases=PHASES, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=PROGRAMS)
def test_what_a_user_sees_on_a_server_is_what_the_model_says(
    make_nats_backend: Callable[[], Backend], steps: list[Step]
) -> None:
    anyio.run(run_program, make_nats_backend(), steps)
