"""`worker`: start workers, look at them, stop them."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import anyio
import typer

from asyncmq_nats import Queue, Worker, list_workers, set_default_backend, stop_worker
from asyncmq_nats.cli.command import AsJson, AsNames, CommandFailed, Session, command, make_group
from asyncmq_nats.cli.output import duration, instant, number
from asyncmq_nats.cli.program import find_modules_here, load_attribute, log_to_stderr, program
from asyncmq_nats.tasks import list_tasks
from asyncmq_nats.workers import WorkerInfo, import_tasks, start_processes

__all__ = ["group"]

PAIR: Final = re.compile(r"([A-Za-z0-9_-]+):([0-9.]+)")
STOP_CHECK_INTERVAL: Final = 0.1

group = make_group("worker", "Workers: start them, look at them, stop them.")


# -- start


@program(group, "start")
def start(
    session: Session,
    queues: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[QUEUE]...",
            help="Queues to serve, with one connection; by default those of the tasks.",
        ),
    ] = None,
    app: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME", help="A Worker, a Queue or a list of queues in your code."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Module with tasks to import; may be repeated."),
    ] = None,
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            "--concurrency",
            "-c",
            metavar="N|QUEUE:N",
            help="Jobs at a time: in all queues together, or of each, as in mail:20.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="QUEUE:N", help="Share of the starts, where slots are shared."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Serve the queues in their order; slots are shared.")
    ] = False,
    processes: Annotated[int, typer.Option("--processes", "-p", help="Worker processes.")] = 1,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start again when a Python file here changes.")
    ] = False,
    burst: Annotated[bool, typer.Option("--burst", help="End when the queues are empty.")] = False,
    max_jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Start a new process after N jobs.")
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(metavar="MB", help="Start a new process above MB megabytes of memory."),
    ] = None,
    health_port: Annotated[
        int | None,
        typer.Option(min=1, max=65_535, metavar="PORT", help="Answer probes: /livez, /readyz."),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65_535, metavar="PORT", help="Show /metrics to Prometheus."),
    ] = None,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="What is logged.")] = "INFO",
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log lines of JSON, with the job's fields.")
    ] = False,
) -> None:
    """Run jobs until SIGTERM or Ctrl-C.

    Jobs that run may finish for ASYNCMQ_NATS_SHUTDOWN_TIMEOUT seconds; the rest is handed back. A
    second signal ends at once.
    """
    log_to_stderr(log_level, as_json=log_json)
    find_modules_here()
    # Before anything is imported: code that is broken now is started again when it is mended.
    if reload and start_processes(processes, reload=True):
        return
    # `-c mail:20 reports:2`: the second word comes as a queue, and no name of one has a colon.
    pairs = [word for word in queues or [] if ":" in word] if concurrency else []
    queues = [word for word in queues or [] if word not in pairs]
    options: dict[str, Any] = {
        "concurrency": read_concurrency([*(concurrency or []), *pairs]),
        "weights": read_pairs(weight or [], "--weight") or None,
        "strict": strict,
        "processes": processes,
        "burst": burst,
        "max_jobs": max_jobs,
        "max_memory": max_memory,
    }
    worker = make_worker(session, app, tasks or [], queues or [], options)
    for queue in worker.queues:
        if health_port is not None:
            queue.backend.settings.health_port = health_port
        if metrics_port is not None:
            queue.backend.settings.metrics_port = metrics_port
    worker.start()


def make_worker(
    session: Session,
    app: str | None,
    tasks: Sequence[str],
    names: Sequence[str],
    options: Mapping[str, Any],
) -> Worker:
    """Return the worker that the command line asks for.

    Raises:
        CommandFailed: there is no queue to serve, or what `--app` names cannot be used.
    """
    set_default_backend(session.backend)
    import_tasks([*session.backend.settings.tasks, *tasks])
    found = None if app is None else load_attribute(app)
    if isinstance(found, Worker):
        if names or options["concurrency"] is not None:
            raise CommandFailed(
                f"{app} is a Worker, which says by itself what it serves: "
                "leave queues and --concurrency out, or name its queues as --app"
            )
        return found
    known = _read_app(app, found)
    if not names:
        names = list(known) or sorted({task.queue for task in list_tasks().values()})
    if not names:
        raise CommandFailed(
            "no queue to serve: name one, or the modules of the tasks by --tasks (or --app)"
        )
    return Worker([known.get(name, name) for name in names], **options)


def _read_app(app: str | None, found: Any) -> dict[str, Queue]:
    queues = [] if found is None else [found] if isinstance(found, Queue) else found
    if not isinstance(queues, list | tuple) or not all(isinstance(each, Queue) for each in queues):
        raise CommandFailed(f"{app} is a {type(found).__name__}: name a Worker, a Queue or a list")
    return {queue.name: queue for queue in queues}


def read_concurrency(texts: Sequence[str]) -> int | dict[str, int] | None:
    """Return one number, or numbers by queue; `None` if nothing was given.

    Raises:
        CommandFailed: it is neither `20` nor `mail:20 reports:2`.
    """
    words = " ".join(texts).replace(",", " ").split()
    if len(words) == 1 and words[0].isdecimal():
        return int(words[0])
    pairs = read_pairs(texts, "--concurrency")
    if any(value != int(value) for value in pairs.values()):
        raise CommandFailed(f"--concurrency takes whole numbers, not {' '.join(words)!r}")
    return {name: int(value) for name, value in pairs.items()} or None


def read_pairs(texts: Sequence[str], option: str) -> dict[str, float]:
    """Return the numbers by queue in `mail:3 reports:1`.

    Raises:
        CommandFailed: a word is something else.
    """
    pairs: dict[str, float] = {}
    for word in " ".join(texts).replace(",", " ").split():
        match = PAIR.fullmatch(word)
        try:
            pairs[match[1] if match else ""] = float(match[2] if match else "?")
        except ValueError:
            raise CommandFailed(
                f"{option} takes QUEUE:NUMBER, as in mail:20, not {word!r}"
            ) from None
    return pairs


# -- look, stop


def _grouped(entries: Sequence[WorkerInfo]) -> dict[str, list[WorkerInfo]]:
    """Return the entries by worker: one that serves several queues has one for each."""
    workers: dict[str, list[WorkerInfo]] = {}
    for entry in sorted(entries, key=lambda each: (each.id, each.queue)):
        workers.setdefault(entry.id, []).append(entry)
    return workers


def _summary(entries: Sequence[WorkerInfo]) -> dict[str, Any]:
    first = entries[0]
    return {
        "id": first.id,
        "queues": {
            each.queue: {
                "slots": each.concurrency,
                "busy": each.busy,
                "running": each.running,
                "starts": each.starts,
            }
            for each in entries
        },
        "state": "stopping" if any(each.stopping for each in entries) else "running",
        "version": first.version,
        "host": first.host,
        "pid": first.pid,
        "memory": first.memory,
        "started": min(each.since for each in entries),
        "heartbeat": max(each.heartbeat for each in entries),
    }


@command(group, "list")
async def list_all(
    session: Session,
    queue: Annotated[str | None, typer.Option(metavar="QUEUE", help="Of this queue only.")] = None,
    as_json: AsJson = False,
    names: AsNames = False,
) -> None:
    """List the running workers.

    One that was killed is listed until three heartbeats are missing.
    """
    workers = _grouped(await list_workers(session.backend, queue))
    if names:
        for worker in workers:
            session.output.raw(worker)
        return
    rows = [_summary(entries) for entries in workers.values()]
    if as_json:
        session.output.json(rows)
        return
    now = session.backend.now()
    session.output.table(
        ["worker", "queues", "#busy", "#memory", "version", "state", "#up", "#heard"],
        [
            [
                row["id"],
                ", ".join(f"{name}:{each['slots']}" for name, each in row["queues"].items()),
                number(sum(each["busy"] for each in row["queues"].values())),
                _megabytes(row["memory"]),
                row["version"] or "-",
                row["state"],
                duration(max(0.0, now - row["started"])),
                duration(max(0.0, now - row["heartbeat"])),
            ]
            for row in rows
        ],
    )


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size // 1_000_000} MB"


@command(group, "info")
async def info(session: Session, worker: str, as_json: AsJson = False) -> None:
    """Show one worker: what it runs, its slots, its process."""
    entries = _grouped(await list_workers(session.backend)).get(worker)
    if entries is None:
        raise CommandFailed(f"there is no worker {worker!r} (`worker list` shows those that run)")
    row = _summary(entries)
    if as_json:
        session.output.json(row)
        return
    fields = {
        "worker": row["id"],
        "state": row["state"],
        "host": row["host"],
        "pid": str(row["pid"]),
        "version": row["version"] or "-",
        "memory": _megabytes(row["memory"]),
        "started": instant(row["started"]),
        "heard": instant(row["heartbeat"]),
    }
    for name, queue in row["queues"].items():
        fields[f"queue {name}"] = f"{queue['busy']} of {queue['slots']} slots busy"
        if queue["running"]:
            fields[f"  runs of {name}"] = "\n".join(queue["running"])
    session.output.fields(fields)


@command(group, "stop", audited=True)
async def stop(
    session: Session,
    workers: Annotated[list[str], typer.Argument(metavar="WORKER...", help="Ids of workers.")],
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until they have ended.")] = False,
) -> None:
    """Stop workers in order, as by SIGTERM: they finish what runs, and are not started again."""
    missing = []
    for worker in workers:
        if await stop_worker(session.backend, worker):
            session.output.note(f"{worker} stops")
        else:
            missing.append(worker)
    while wait and await _are_listed(session, workers):  # noqa: ASYNC110  no event says so
        await anyio.sleep(STOP_CHECK_INTERVAL)
    if missing:
        raise CommandFailed(
            f"not running, or silent: {', '.join(missing)} (`worker list` shows those that run)"
        )


async def _are_listed(session: Session, workers: Sequence[str]) -> bool:
    return any(each.id in workers for each in await list_workers(session.backend))
