"""Measure ours and other job queues side by side, in one run.

    nox -s peers                                 # in an environment of its own
    python -m benchmarks.peers [--rounds 3] [--only ours.py asyncmq_redis.py] [--tiny]
    python -m benchmarks.peers --write           # and keep it: figures.json, pages, charts
    python -m benchmarks.peers --read benchmarks/peers/figures.json  # nothing is measured

Makes an environment for each library, starts its server, and runs the workload of `workload.py`.
Keeps the last run in .environments/last.json. Needs Linux, redis-server, PostgreSQL's server
programs and npm; a library whose part is missing is left out.
"""

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks.peers.environments import FOLDER, make_environment
from benchmarks.peers.figures import Row, Run, show_ratios, show_table
from benchmarks.peers.library import OURS, PEERS, Peer
from benchmarks.peers.pages import FIGURES, write_pages
from benchmarks.peers.workload import FULL, TINY, Round, Size, measure_round

ADDITIONS: Final = 1_000_000


def loop_milliseconds() -> float:
    """Return what a loop of a million additions takes: how fast the machine is just now."""
    begun, total = time.perf_counter(), 0
    for number in range(ADDITIONS):
        total += number
    return (time.perf_counter() - begun) * 1000


def install(peer: Peer) -> bool:
    """Make the environment of a library. Return whether that worked."""
    try:
        make_environment(peer)
    except (OSError, subprocess.CalledProcessError) as problem:
        print(f"{peer.name} is left out: {problem}", flush=True)
        return False
    return True


def run_all(peers: Sequence[Peer], rounds: int, size: Size) -> Run:
    """Measure the libraries, each second round in reverse. One that fails is left out."""
    run = Run(OURS.name, {peer.name: Row(note=peer.note) for peer in peers})
    loads: list[float] = []
    loops: list[float] = []

    def look_at_machine(step: str) -> None:
        loads.append(round(os.getloadavg()[0], 1))
        loops.append(round(loop_milliseconds()))
        now = datetime.now(UTC).strftime("%H:%M:%S")
        print(f"{now} {step}: load {loads[-1]}, a million additions {loops[-1]} ms", flush=True)

    for number in range(rounds):
        ordered = [peer for peer in peers if peer.name in run.rows][:: -1 if number % 2 else 1]
        found = measure_round(ordered, size, FOLDER, look_at_machine)
        run.rows = {name: row for name, row in run.rows.items() if name in found}
        for name, row in run.rows.items():
            note(row, found[name])
    run.machine = {
        "taken": datetime.now(UTC).strftime("%B %Y"),
        "rounds": rounds,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": loads,
        "loop_ms": loops,
    }
    return run


def note(row: Row, found: Round) -> None:
    """Add what a round found to a library's row."""
    row.versions, row.server, row.no_way = found.versions, found.server, found.no_way
    for key, value in found.figures.items():
        row.figures.setdefault(key, []).append(round(value, 2))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    adapters = [peer.adapter for peer in PEERS]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=adapters, default=adapters, metavar="ADAPTER")
    parser.add_argument("--tiny", action="store_true", help="few jobs: to try an adapter")
    parser.add_argument("--write", action="store_true", help="keep the figures; renew the pages")
    parser.add_argument("--read", type=Path, help="a file with figures, instead of measuring")
    return parser.parse_args()


def main() -> None:
    """Do what the command line says."""
    given = parse()
    if given.read:
        run = Run.from_json(given.read.read_text())
    else:
        FOLDER.mkdir(exist_ok=True)
        peers = [peer for peer in PEERS if peer.adapter in given.only and install(peer)]
        run = run_all(peers, given.rounds, TINY if given.tiny else FULL)
        (FOLDER / "last.json").write_text(run.to_json())
    print(f"\n{show_table(run)}\n{show_ratios(run)}")
    if given.write:
        FIGURES.write_text(run.to_json())
        write_pages(run)


if __name__ == "__main__":
    main()
