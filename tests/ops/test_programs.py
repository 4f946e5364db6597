"""Worker programs with a supervisor.

What starts a process again, what does not; nothing is lost.
"""

from pathlib import Path

import anyio

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.workers import list_workers, stop_worker
from tests.ops.programs import python, started
from tests.receiver import PATIENCE, until
from tests.running import only, outcome

PROGRAM = """
import logging, os
from pathlib import Path
import anyio
from asyncmq_nats import Worker, task
from answers import ANSWER

@task(queue="mail", name="mail")
async def mail(waits: bool = False) -> list:
    while waits and not Path("go").exists():
        await anyio.sleep(0.01)
    return [ANSWER, os.getpid()]

@task(queue="reports", name="reports")
async def reports() -> list:
    return [ANSWER, os.getpid()]

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    Worker(["mail", "reports"], {options}).start()
"""


def write(directory: Path, options: str) -> list[str]:
    directory.mkdir()
    (directory / "answers.py").write_text("ANSWER = 'old'\n")
    program = directory / "program.py"
    program.write_text(PROGRAM.replace("{options}", options))
    return python(program)


async def test_a_process_that_has_run_its_jobs_is_replaced(
    server: EmbeddedServer, nats_backend: NATSBackend, tmp_path: Path
) -> None:
    queue = Queue("mail", nats_backend)
    jobs = [await queue.add("mail") for _ in range(4)]
    command = write(tmp_path / "app", "max_jobs=2")
    with started(command, tmp_path / "app", ASYNCMQ_NATS_SERVERS=server.url) as program:
        with anyio.fail_after(2 * PATIENCE):
            pids = [(await queue.wait_for(job_id))[1] for job_id in jobs]
            await program.logged(" runs queue mail", times=3)
        assert len(set(pids)) == 2
        assert program.stop() == 0
    assert "it has run its number of jobs" in program.log
    await only(queue, completed=4)


async def test_a_supervised_worker_that_is_stopped_by_its_id_is_not_started_again(
    server: EmbeddedServer, nats_backend: NATSBackend, tmp_path: Path
) -> None:
    command = write(tmp_path / "app", "processes=2")
    with started(command, tmp_path / "app", ASYNCMQ_NATS_SERVERS=server.url) as program:
        with anyio.fail_after(2 * PATIENCE):
            entries = await until(lambda: list_workers(nats_backend), lambda found: len(found) == 4)
            first, second = sorted({entry.id for entry in entries})
            assert await stop_worker(nats_backend, first)
            await until(
                lambda: list_workers(nats_backend),
                lambda found: {entry.id for entry in found} == {second},
            )
            assert await stop_worker(nats_backend, second)
            assert await program.wait() == 0
    assert program.log.count("runs queue mail") == 2


async def test_a_change_of_the_code_starts_it_again_and_what_runs_finishes(
    server: EmbeddedServer, nats_backend: NATSBackend, tmp_path: Path
) -> None:
    queue = Queue("mail", nats_backend)
    command = write(tmp_path / "app", "reload=True")
    with started(command, tmp_path / "app", ASYNCMQ_NATS_SERVERS=server.url) as program:
        with anyio.fail_after(2 * PATIENCE):
            running = await queue.add("mail", [True])
            await until(lambda: queue.get_job_count_by_types("active"), lambda count: count == 1)
            (tmp_path / "app" / "answers.py").write_text("ANSWER = 'broken\n")
            await program.logged("SyntaxError")
            (tmp_path / "app" / "answers.py").write_text("ANSWER = 'new'\n")
            later = await queue.add("mail")
            new, new_pid = await queue.wait_for(later)
            assert new == "new"
            assert await queue.get_job_state(running) == "active"
            (tmp_path / "app" / "go").touch()
            old, old_pid = (await outcome(queue, running))["result"]
            assert (old, old_pid == new_pid) == ("old", False)
        assert program.stop() == 0
    await only(queue, completed=2)


async def test_a_burst_of_several_processes_ends_when_the_queues_are_empty(
    server: EmbeddedServer, nats_backend: NATSBackend, tmp_path: Path
) -> None:
    queues = [Queue("mail", nats_backend), Queue("reports", nats_backend)]
    for queue in queues:
        await queue.add_bulk([{"task_id": queue.name}] * 50)
    command = write(tmp_path / "app", "processes=2, burst=True, concurrency=5")
    with started(command, tmp_path / "app", ASYNCMQ_NATS_SERVERS=server.url) as program:
        assert await program.wait() == 0
    for queue in queues:
        await only(queue, completed=50)
