"""Commands of queues, jobs, schedules, flows, events, settings, permissions, on real servers."""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest

from asyncmq_nats import FlowProducer, Job, NATSBackend, current_job
from asyncmq_nats.cli import permissions
from asyncmq_nats.cli.app import run
from tests.cli.amq import Amq
from tests.receiver import PATIENCE, until
from tests.running import counted, has, make_queue, only, run_jobs, running

COMMANDS = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
TABLE = COMMANDS.partition("## Coming from AsyncMQ")[2].partition("\nOnly here")[0]
OURS = re.findall(r"\| `([^`]+)`[^|]* \| `amq ([^`]+)` \|", TABLE)
PROGRAMS = ("worker start",)
"""Commands that run on; tests/ops runs them."""


async def echo(value: Any = None) -> Any:
    return value


async def fail(value: Any = None) -> None:
    raise RuntimeError(f"boom {value}")


# -- AsyncMQ's commands


def test_asyncmqs_whole_list_of_commands_is_in_the_table() -> None:
    groups = {
        "info": ["version", "backend"],
        "worker": ["start", "list", "inspect", "register", "deregister"],
        "queue": [
            *(
                "list",
                "pause",
                "resume",
                "info",
                "list-delayed",
                "remove-delayed",
                "drain",
                "clean",
            ),
            *("obliterate", "list-repeatables", "pause-repeatable", "resume-repeatable"),
        ],
        "job": ["list", "inspect", "retry", "remove", "cancel"],
    }
    wanted = {f"{group} {name}" for group, names in groups.items() for name in names}
    shown = {" ".join(name.split()[:2]) for name in re.findall(r"^\| `([^`]+)`", TABLE, re.M)}
    assert shown - {"asyncmq"} == wanted - {"worker deregister"}
    assert "`worker deregister" in TABLE


@dataclass
class Seen:
    """The state after a command."""

    jobs: dict[str, int]
    paused: bool
    schedules: list[bool]
    """Whether each is paused."""
    failed: dict[str, Any] | None


def was_retried(seen: Seen) -> bool:
    return seen.failed is not None and seen.failed["created_at"] > seen.failed["errors"][0]["at"]


EFFECTS: dict[str, Callable[[Seen], bool]] = {
    "queue pause": lambda seen: seen.paused,
    "queue resume": lambda seen: not seen.paused,
    "queue drain": lambda seen: seen.jobs["delayed"] == 0,
    "queue clean": lambda seen: seen.jobs["completed"] == 0,
    "queue obliterate": lambda seen: not any(seen.jobs.values()) and not seen.schedules,
    "schedule pause": lambda seen: seen.schedules == [True],
    "schedule resume": lambda seen: seen.schedules == [False],
    "job rm": lambda seen: seen.jobs["delayed"] == 0,
    "job cancel": lambda seen: seen.jobs["cancelled"] == 1,
    "job retry": was_retried,
}
"""The effects of a command that changes something."""


@pytest.mark.parametrize(
    "command", [ours for _, ours in OURS if not ours.startswith(PROGRAMS)], ids=lambda x: x
)
async def test_each_of_asyncmqs_commands_has_one_here(
    amq: Amq, nats_backend: NATSBackend, command: str
) -> None:
    queue = make_queue(nats_backend, "mail", echo=echo, fail=fail)
    await queue.add("echo", job_id="done")
    failed = await queue.add("fail")
    await run_jobs(queue)
    delayed = await queue.add("echo", delay=1000)
    await queue.upsert_repeatable("echo", every="1h", name="hourly")
    if "resume" in command:
        await queue.pause()
        await queue.pause_repeatable("hourly")
    job = failed if "retry" in command or "info" in command else delayed
    async with running(queue) as worker:
        for word, value in (("JOB", job), ("NAME", "hourly"), ("ID", worker.id or "")):
            command = re.sub(rf"\b{word}\b", value, command)
        await counted(queue)
        await amq.ok(command)
    await counted(queue)
    seen = Seen(
        await queue.queue_stats(),
        await queue.is_paused(),
        [info.paused for info in await queue.list_repeatables()],
        await queue.get_job(failed),
    )
    effect = EFFECTS.get(" ".join(command.split()[:2]))
    assert effect is None or effect(seen), seen


# -- queues


async def test_queues_are_listed_and_shown(amq: Amq, nats_backend: NATSBackend) -> None:
    assert (await amq.ok("queue ls --names")).out == ""
    queue = make_queue(nats_backend, "mail", echo=echo)
    await queue.add("echo")
    await run_jobs(queue)
    await queue.add_bulk([{"task_id": "echo", "priority": 1}] * 3)
    await counted(queue)
    assert (await amq.ok("queue ls --names")).lines == ["mail"]
    (row,) = (await amq.ok("queue ls --json")).json
    assert (row["name"], row["paused"], row["counts"]["waiting"]) == ("mail", False, 3)
    assert re.search(r"mail +3 +0 ", (await amq.ok("queue ls")).out)
    info = (await amq.ok("queue info mail --json")).json
    assert info["counts"]["completed"] == 1
    assert info["oldest_waiting_age"] >= 0
    assert info["ended_per_second"]["completed"] == pytest.approx(1 / 60)
    assert info["tiers"][0] == {"priority": 1, "waiting": 3, "active": 0}
    assert info["ready"]["records"] == 3
    text = (await amq.ok("queue info mail")).out
    assert "oldest waiting" in text
    assert "1 completed" in text
    assert "there is no queue 'male' (queues here: mail)" in await amq.fails("queue info male")


async def test_counts_are_watched(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add("echo")
    await counted(queue)
    watched = await amq.ok("queue stats mail --watch --every 50ms --count 3 --json")
    assert [json.loads(line)["counts"]["waiting"] for line in watched.lines] == [1, 1, 1]
    plain = await amq.ok("queue stats mail --watch --every 50ms --count 2")
    assert plain.lines == ["waiting=1 (+0.0/s)"] * 2
    assert (await amq.ok("queue stats mail --json")).json["waiting"] == 1


async def test_a_pause_may_have_an_end(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add("echo")
    await amq.ok("queue pause mail --until 1h")
    info = await queue.info()
    assert info is not None
    assert info.paused_until == pytest.approx(nats_backend.now() + 3600, abs=PATIENCE)
    assert "until" in (await amq.ok("queue info mail")).out
    await amq.ok("queue resume mail")
    assert "no time" in await amq.fails("queue pause mail --until soon")


async def test_a_queue_is_saved_moved_and_restored(
    amq: Amq, nats_backend: NATSBackend, tmp_path: Path
) -> None:
    queue = make_queue(nats_backend, "mail", fail=fail)
    await queue.add("fail")
    await run_jobs(queue)
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(5)])
    await counted(queue)
    saved = await amq.ok(f"queue export mail {tmp_path / 'mail.jsonl'}")
    assert "saved 6 jobs" in saved.err
    added = await amq.ok(f"queue import copy {tmp_path / 'mail.jsonl'}")
    assert added.out == "added 6 jobs; 0 were there already\n"
    again = await amq.ok(f"queue import copy {tmp_path / 'mail.jsonl'}")
    assert again.out == "added 0 jobs; 6 were there already\n"
    (tmp_path / "junk").write_text("{}\n\n{")
    assert "must have a state" in await amq.fails(f"queue import copy {tmp_path / 'junk'}")
    would = await amq.ok("queue move mail post --all --dry-run")
    assert would.out == "would move up to 6 jobs\n"
    assert "move up to 6 jobs of queue mail to post?" in await amq.fails(
        "queue move mail post --all"
    )
    assert (await amq.ok("queue move mail post --all --force")).out == "moved 6 of 6 jobs\n"
    assert not await queue.is_paused()
    await only(make_queue(nats_backend, "post"), waiting=5, failed=1)
    await counted(make_queue(nats_backend, "post"))
    assert len((await amq.ok("queue export post")).lines) == 7


async def test_a_queue_that_is_paused_while_a_move_asks_stays_paused(
    amq: Amq, nats_backend: NATSBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add("t")
    await counted(queue)

    def confirm(*_: Any, **__: Any) -> None:
        anyio.from_thread.run(queue.pause)

    monkeypatch.setattr("asyncmq_nats.cli.queue.confirm", confirm)
    assert (await amq.ok("queue move mail post --all")).out == "moved 1 of 1 job\n"
    assert await queue.is_paused()


async def test_a_list_says_when_delayed_jobs_run(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add("t")
    assert "runs at" not in (await amq.ok("job ls mail")).out
    await amq.ok("job add mail t --delay 2100-01-31T12:00")
    await counted(queue)
    header, waiting, delayed = (await amq.ok("job ls mail")).lines
    assert "runs at" in header
    assert "2100-01-31 12:00:00" in delayed
    assert "2100" not in waiting


async def test_some_of_many_jobs_cannot_be_edited(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail", echo=echo)
    waits = await queue.add("echo")
    await queue.add("echo", job_id="delayed", delay=1000)
    await counted(queue)
    result = await amq.ok("job edit mail --all -k value=1 --force")
    assert result.out == "edited 1 of 2 jobs\n"
    assert "pause the queue first" in result.err
    assert "edited 1 of 2 jobs" in (await amq(f"job edit mail {waits} delayed -k value=2")).err
    assert "pause the queue first" in await amq.fails(f"job edit mail {waits} -k value=2")
    await queue.pause()
    await counted(queue)
    assert (await amq.ok("job edit mail --all -k value=3 --force")).out == "edited 2 of 2 jobs\n"


async def test_one_job_is_one_job(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add("t", delay=1000)
    await counted(queue)
    assert (await amq.ok("job cancel mail --all --dry-run")).out.startswith("1 job matches;")
    assert "cancel 1 job of queue mail?" in await amq.fails("job cancel mail --all")
    assert (await amq.ok("job cancel mail --all -f")).out == "cancelled 1 of 1 job\n"


async def test_a_job_that_runs_is_shown_with_its_worker(
    amq: Amq, nats_backend: NATSBackend
) -> None:
    release = anyio.Event()
    queue = make_queue(nats_backend, "mail", wait=release.wait)
    async with running(queue) as worker:
        job_id = await queue.add("wait")

        async def shown() -> str:
            return (await amq.ok(f"job info mail {job_id}")).out

        text = await until(shown, lambda text: f"worker    {worker.id}" in text)
        assert "\nstarted   20" in text
        release.set()


async def test_lines_of_tables_have_no_blanks_at_their_ends(
    amq: Amq, nats_backend: NATSBackend
) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add_bulk([{"task_id": "t"}, {"task_id": "t", "delay": 1000}])
    for line in ("queue ls", "queue info mail", "queue stats mail", "job ls mail", "config show"):
        for shown in (await amq.ok(line)).lines:
            assert shown == shown.rstrip(), line


async def test_what_destroys_asks_first(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add_bulk([{"task_id": "t"}] * 4)
    await counted(queue)
    for line in ("queue drain mail", "queue obliterate mail", "job rm mail --all"):
        assert "add --force" in await amq.fails(line)
        assert "4 jobs" in (await amq.ok(f"{line} --dry-run")).out
    await only(queue, waiting=4)
    assert (await amq.ok("job rm mail --task t --limit 3 --force")).out == "removed 3 of 3 jobs\n"
    await only(queue, waiting=1)


# -- jobs


async def test_jobs_are_added_shown_and_waited_for(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail", echo=echo, fail=fail)
    added = await amq.ok("""job add mail echo '{"a": [1]}' --id one --retries 2 --priority 3""")
    assert added.out == "one\n"
    await amq.ok("job add mail echo -k value=five --id two --depends-on one")
    assert "has not ended" in await amq.fails("job result mail one")
    async with running(queue):
        assert (await amq.ok("job result mail two --max-wait 60s")).json == "five"
        assert (await amq.ok("job add mail echo --wait -- -7")).lines[1:] == ["-7"]
        failed = (await amq.ok("job add mail fail x")).out.strip()
        assert "boom x" in await amq.fails(f"job result mail {failed} --wait")
    shown = (await amq.ok("job info mail one --json")).json
    assert (shown["args"], shown["max_retries"], shown["priority"]) == ([{"a": [1]}], 2, 3)
    text = (await amq.ok(f"job info mail {failed}")).out
    assert "RuntimeError: boom x" in text
    assert "Traceback" in text
    assert "has no job" in await amq.fails("job info mail nothing")
    assert "write NAME=VALUE" in await amq.fails("job add mail echo -k value")


async def test_jobs_are_listed_by_filters(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail", fail=fail)
    await queue.add_bulk([{"task_id": "fail", "args": [n], "job_id": f"j{n}"} for n in range(4)])
    await run_jobs(queue)
    await queue.add("other", delay=1000, job_id="late")
    await counted(queue)
    names = await amq.ok("job ls mail --state failed --search 'boom 2' --names")
    assert names.lines == ["j2"]
    everything = (await amq.ok("job ls mail --since 1h --json")).json
    assert {job["id"] for job in everything} == {"j0", "j1", "j2", "j3", "late"}
    assert (await amq.ok("job ls mail --until 1h --json")).json == []
    limited = await amq.ok("job ls mail --limit 2")
    assert len(limited.lines) == 3
    assert "--all shows more" in limited.err
    assert "state must be one of" in await amq.fails("job ls mail --state faild")


async def test_all_that_match_are_retried(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail", fail=fail)
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(30)])
    await run_jobs(queue)
    line = "job retry mail --task fail --search 'boom 1'"
    assert (await amq.ok(f"{line} --dry-run")).out == "11 jobs match; nothing was done\n"
    assert "retry 11 jobs of queue mail?" in await amq.fails(line)
    assert (await amq.ok(f"{line} --force")).out == "retried 11 of 11 jobs\n"
    await has(queue, 19, "failed")
    ids = (await amq.ok("job ls mail --state failed --names --limit 2")).lines
    assert (await amq.ok(f"job retry mail {' '.join(ids)}")).out == "retried 2 of 2 jobs\n"
    assert "retried 0 of 2 jobs" in await amq.fails(f"job retry mail {' '.join(ids)}")
    assert "say which jobs" in await amq.fails("job retry mail")
    assert "not both" in await amq.fails("job retry mail an-id --task fail")


async def test_delayed_jobs_are_promoted_moved_in_time_and_edited(
    amq: Amq, nats_backend: NATSBackend
) -> None:
    queue = make_queue(nats_backend, "mail", echo=echo)
    await amq.ok("job add mail echo 1 --id one --delay 1h")
    await amq.ok("job add mail echo 2 --id two --delay 1h")
    await amq.ok("job edit mail one --args '[10]'")
    await amq.ok("job edit mail two --args '[]' -k value=20")
    assert "must be a JSON list" in await amq.fails("job edit mail one --args 5")
    assert "say what to change" in await amq.fails("job edit mail one")
    await counted(queue)
    assert (await amq.ok("job edit mail --task echo -k more=1 --dry-run")).out.startswith("2 jobs")
    assert (await amq.ok("job edit mail --all -k n=1 -f")).out == "edited 2 of 2 jobs\n"
    edited = [(await queue.get_job(job_id) or {})["kwargs"] for job_id in ("one", "two")]
    assert edited == [{"n": 1}, {"value": 20, "n": 1}]
    await counted(queue)
    await amq.ok("job edit mail --search '*' --state delayed --kwargs '{}' -f")
    await amq.ok("job edit mail one two --kwargs '{}'")
    await amq.ok("job edit mail two -k value=20")
    assert "edit is for jobs that are waiting" in await amq.fails(
        "job edit mail --state failed -k a=1"
    )
    await amq.ok("job reschedule mail one --at 2h")
    await counted(queue)
    (first,) = [each for each in await queue.list_delayed() if each.job_id == "one"]
    assert first.run_at == pytest.approx(nats_backend.now() + 7200, abs=PATIENCE)
    assert "say which jobs" in await amq.fails("job reschedule mail --at 2h")
    assert (await amq.ok("job promote mail --all --force")).out == "promoted 2 of 2 jobs\n"
    await run_jobs(queue)
    assert await queue.get_job_result("one") == 10
    assert await queue.get_job_result("two") == 20


async def test_a_job_is_tried_here_and_left_as_it_is(
    amq: Amq, nats_backend: NATSBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tried_tasks.py").write_text(
        "from asyncmq_nats import task\n\n"
        "@task(queue='mail', name='half')\ndef half(value: int) -> float:\n    return 1 / value\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    queue = make_queue(nats_backend, "mail")
    await queue.add("half", [2], job_id="good")
    await queue.add("half", [0], job_id="bad")
    assert (await amq.ok("job run mail good --tasks tried_tasks")).json == 0.5
    bad = await amq("job run mail bad --tasks tried_tasks")
    assert bad.code == 1
    assert "return 1 / value" in bad.out
    assert bad.err.splitlines()[-1] == "error: ZeroDivisionError: division by zero"
    await only(queue, waiting=2)


async def test_lines_of_a_job_are_shown(amq: Amq, nats_backend: NATSBackend) -> None:
    async def tell() -> None:
        current_job().log("halfway")

    queue = make_queue(nats_backend, "mail", tell=tell)
    job_id = await queue.add("tell")
    await run_jobs(queue)
    assert re.search(r"INFO +halfway$", (await amq.ok(f"job logs mail {job_id}")).out.strip())
    (line,) = (await amq.ok(f"job logs mail {job_id} --json")).json
    assert (line["message"], line["attempt"]) == ("halfway", 1)
    assert "has no job" in await amq.fails("job logs mail nothing")


# -- schedules, flows, events


async def test_schedules_from_first_to_last(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail")
    added = await amq.ok(
        "schedule add mail nightly clean old -k deep=true --cron '30 4 * * mon-fri' "
        "--timezone Europe/Berlin"
    )
    words = "At 04:30, Monday through Friday (Europe/Berlin)"
    assert added.out.startswith(f"nightly: {words}, next run ")
    assert "`schedule edit` changes it" in await amq.fails("schedule add mail nightly x --every 5m")
    await amq.ok("schedule add mail often ping --every 90s --jitter 5s --overlap skip")
    listed = (await amq.ok("schedule ls mail --json")).json
    assert {each["id"]: each["words"] for each in listed} == {
        "nightly": words,
        "often": "Every 1m30s",
    }
    assert "Every 1m30s" in (await amq.ok("schedule ls mail")).out
    assert (await amq.ok("schedule info mail nightly --json")).json["kwargs"] == {"deep": True}
    runs = (await amq.ok("schedule next mail often --count 3 --json")).json
    assert [later - sooner for sooner, later in pairwise(runs)] == [90, 90]
    await amq.ok("schedule edit mail nightly --every 2h")
    edited = (await amq.ok("schedule info mail nightly --json")).json
    assert (edited["every"], edited["args"]) == (7200, ["old"])
    assert "must be a JSON list" in await amq.fails("schedule edit mail nightly --args old")
    await amq.ok("schedule edit mail nightly --args '[\"new\"]'")
    assert (await amq.ok("schedule info mail nightly --json")).json["args"] == ["new"]
    await amq.ok("schedule edit mail nightly --args '[\"old\"]'")
    await amq.ok("schedule pause mail nightly")
    assert "paused" in (await amq.ok("schedule info mail nightly")).out
    await amq.ok("schedule resume mail nightly")
    job_id = (await amq.ok("schedule run-now mail nightly")).out.strip()
    job = await queue.get_job(job_id)
    assert job is not None
    assert (job["task"], job["args"], job["kwargs"]) == ("clean", ["old"], {"deep": True})
    assert "last run" not in (await amq.ok("schedule info mail nightly")).out
    await amq.ok("schedule add mail soon ping --every 0.1s --runs 1")

    async def last_job() -> Any:
        return (await amq.ok("schedule info mail soon --json")).json["last_job"]

    async with running(queue):
        last = await until(last_job, bool)
    lines = (await amq.ok("schedule info mail soon")).lines
    assert [line.split()[2:] for line in lines if line.startswith("last job")] == [[last]]
    assert any(line.startswith("last run") for line in lines)
    await amq.ok("schedule rm mail soon")
    await amq.ok("schedule rm mail nightly")
    assert "no schedule 'nightly' (there: often)" in await amq.fails("schedule rm mail nightly")
    assert "cron '61 * * * *'" in await amq.fails("schedule add mail bad x --cron '61 * * * *'")


async def test_a_flow_is_a_tree(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add("load", job_id="base", delay=1000)
    await queue.add("left", job_id="l", depends_on=["base"])
    await queue.add("right", job_id="r", depends_on=["base"])
    await queue.add("join", job_id="top", depends_on=["l", "r"])
    tree = (await amq.ok("flow show mail top")).lines
    assert tree == [
        "top  join  waiting-children",
        "├── l  left  waiting-children",
        "│   └── base  load  delayed",
        "└── r  right  waiting-children",
        "    └── base  load  delayed",
    ]
    assert (await amq.ok("flow show mail base")).lines[1] in (
        "waited for by: l, r",
        "waited for by: r, l",
    )
    data = (await amq.ok("flow show mail top --json")).json
    assert (sorted(data["jobs"]), data["complete"]) == (["base", "l", "r", "top"], True)
    assert not (await amq.ok("flow show mail top --json --limit 2")).json["complete"]


async def test_a_tree_is_drawn_in_ascii_where_the_output_takes_no_more(
    nats_backend: NATSBackend, server: Any
) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add("load", job_id="base", delay=1000)
    await queue.add("join", job_id="top", depends_on=["base"])
    line = [sys.executable, "-m", "asyncmq_nats", "flow", "show", "mail", "top", "-s", server.url]
    with anyio.fail_after(PATIENCE):
        done = await anyio.run_process(line, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.stdout == b"top  join  waiting-children\n`-- base  load  delayed\n"


async def test_a_long_chain_is_shown_whole(
    amq: Amq, nats_backend: NATSBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a terminal as well, and where Python's stack is too short for it."""
    monkeypatch.setattr("asyncmq_nats.cli.output.PIPE_WIDTH", 80)
    chain = [
        Job("step", job_id=f"s{number}", depends_on=[f"s{number - 1}"] if number else [])
        for number in range(1100)
    ]
    await FlowProducer(nats_backend).add_flow("mail", chain)
    shown = (await amq.ok("flow show mail s1099 --limit 2000")).lines
    assert len(shown) == 1100
    assert shown[-1].lstrip(" └─") == "s0  step  waiting"


async def test_events_are_followed(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, "mail", echo=echo)
    await queue.add("echo", ["first"])
    shown: list[str] = []

    async def follow() -> None:
        result = await amq.ok("events mail --type completed --task echo --count 2 --json")
        shown.extend(result.lines)

    async with running(queue), anyio.create_task_group() as group:
        group.start_soon(follow)
        with anyio.fail_after(PATIENCE):
            while not shown:  # until it listens
                await queue.add("other")
                await queue.add("echo", ["next"])
                await anyio.sleep(0.1)
    events = [json.loads(line) for line in shown]
    assert [(event["event"], event["data"]["result"]) for event in events] == [
        ("job:completed", "next")
    ] * 2
    assert "no type of event" in await amq.fails("events mail --type ended")


# -- settings, permissions, help


async def test_settings_are_shown_with_their_sources(
    amq: Amq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_USER", "ada")
    monkeypatch.setenv("NATS_PASSWORD", "secret")
    monkeypatch.setenv("ASYNCMQ_NATS_STALLED_AFTER", "7")
    shown = (await amq.ok("config show --prefix shop --timeout 3s --json")).json
    rows = {row["name"]: (row["value"], row["source"]) for row in shown}
    assert rows["prefix"] == ("shop", "--prefix")
    assert rows["connect_timeout"] == (3.0, "--timeout")
    assert rows["user"] == ("ada", "NATS_USER")
    assert rows["password"] == ("**********", "NATS_PASSWORD")
    assert rows["stalled_after"] == (7.0, "ASYNCMQ_NATS_STALLED_AFTER")
    assert rows["replicas"] == (1, "default")
    assert rows["servers"][1] == "--server"
    assert "secret" not in (await amq.ok("config show")).out


async def test_permissions_are_those_of_the_document(amq: Amq) -> None:
    for role in permissions.ROLES:
        assert permissions.permissions_of(role, "amq", "email")["publish"], role
        printed = await amq.ok(f"permissions {role} mail --prefix shop --user me")
        assert printed.out.startswith("user: me\npermissions: {\n  publish: [\n")
        assert "email" not in printed.out
        assert '"fail"' not in printed.out
    two = (await amq.ok("permissions viewer mail post --json")).json
    assert "$JS.API.DIRECT.GET.amq_mail" in two["publish"]
    assert "$JS.API.DIRECT.GET.KV_amq_post_scheduler" in two["publish"]
    assert "no role" in await amq.fails("permissions boss mail")


async def test_wrong_usage_is_one_line_and_code_2(amq: Amq) -> None:
    assert "Did you mean 'ls'" in await amq.fails("queue lss", 2)
    assert "Missing argument" in await amq.fails("job info mail", 2)
    assert "cannot reach NATS" in await amq.fails("queue ls -s nats://127.0.0.1:1 --timeout 1s")
    assert "no address" in await amq.fails("queue ls -s http://x")


@pytest.mark.parametrize(
    "line",
    ["queue info nothing -v", "-v queue info nothing", "worker start --app no.such:name -v"],
)
async def test_errors_have_their_traceback_with_v(
    amq: Amq, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr("asyncmq_nats.cli.command._verbose", False)
    result = await amq(line)
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err


@pytest.mark.parametrize("line", ["job ls mail --all --json", "queue export mail"])
async def test_a_reader_may_close_the_pipe(
    nats_backend: NATSBackend, server: Any, line: str
) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add_bulk([{"task_id": "t", "args": ["x" * 1000]}] * 500)
    command = shlex.join([sys.executable, "-m", "asyncmq_nats", *line.split(), "-s", server.url])
    shell = ["bash", "-o", "pipefail", "-c", f"{command} | head -c 10"]
    with anyio.fail_after(2 * PATIENCE):
        done = await anyio.run_process(shell, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


async def test_an_interrupted_command_says_how_to_go_on(
    nats_backend: NATSBackend, server: Any
) -> None:
    """SIGINT comes while jobs are retried; the printed command does the rest, each job once."""
    queue = make_queue(nats_backend, "mail", fail=fail)
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(1500)])
    await run_jobs(queue)
    await counted(queue)
    line = [sys.executable, "-m", "asyncmq_nats", "job", "retry", "mail", "--task", "fail", "-f"]
    line += ["--since", "1h", "--limit", "1400"]
    async with await anyio.open_process([*line, "-s", server.url]) as process:

        async def failed() -> int:
            return (await queue.queue_stats())["failed"]

        await until(failed, lambda count: count < 1500)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        told = b"".join([part async for part in process.stderr]).decode()
        if await process.wait() == 0:
            pytest.skip("it was done before the signal came")
    assert process.returncode == 130
    found = re.search(r"to go on: amq (.*)", told)
    assert found, told
    assert "--since 1h" not in told  # it would be another hour
    code = await anyio.to_thread.run_sync(
        run, [*found[1].split(), "--force", "--server", server.url]
    )
    assert code == 0
    await only(queue, waiting=1400, failed=100)


async def test_a_question_ends_at_the_first_sigint(nats_backend: NATSBackend, server: Any) -> None:
    queue = make_queue(nats_backend, "mail")
    await queue.add("fail")
    await counted(queue)
    line = [sys.executable, "-m", "asyncmq_nats", "job", "cancel", "mail", "--all"]
    terminal, inner = os.openpty()
    try:
        async with await anyio.open_process(
            [*line, "-s", server.url], stdin=inner, start_new_session=True
        ) as process:
            assert process.stderr is not None
            told = b""
            while b"[y/N]" not in told:
                told += await process.stderr.receive()
            process.send_signal(signal.SIGINT)
            with anyio.fail_after(PATIENCE):
                assert await process.wait() == 130
    finally:
        os.close(terminal)
        os.close(inner)
    await has(queue, 1)


# -- documents


def test_the_reference_of_the_commands_is_up_to_date() -> None:
    root = Path(__file__).parents[2]
    namespace: dict[str, Any] = {"__name__": "commands", "__file__": str(root / "docs" / "x.py")}
    exec((root / "docs" / "_commands.py").read_text(), namespace)
    assert namespace["write_commands"](COMMANDS) == COMMANDS, "run `python docs/_commands.py`"
