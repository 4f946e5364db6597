"""`benchmarks/peers`: its tables say what was measured, and its workload runs on ours."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers import pages
from benchmarks.peers.environments import adapter_command
from benchmarks.peers.figures import Row, Run, ratio, ratios, show_ratios, show_table, spread
from benchmarks.peers.library import ADAPTERS, OURS, PEERS, RAW, Peer
from benchmarks.peers.pages import renew
from benchmarks.peers.workload import TINY, measure_round

JOBS_A_SECOND = "add_one_by_one", "add_100_at_once", "add_bulk", "process_100", "process_10"
COSTS = "worker_cpu_100", "server_cpu_100"

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="CPU times are read from /proc")


def made() -> Run:
    ours = Row(
        versions={"ours": "1.0"},
        server="nats-server 2.15.1",
        figures={"add_one_by_one": [2000, 3000, 1000], "late_p50": [5, 9, 7], "late_p95": [20] * 3},
    )
    other = Row(
        versions={"other": "2.1", "redis": "8.1"},
        server="Redis 7.0",
        note="keeps no results",
        figures={
            "add_one_by_one": [1000, 1000, 250],
            "late_p50": [50, 9, 21],
            "late_p95": [60] * 3,
        },
        no_way={"add_bulk": "no call adds many jobs"},
    )
    machine = {"taken": "May 2026", "rounds": 3, "cores": 2, "python": "3.11.7"}
    load = {"load": [1.5, 9.1], "loop_ms": [34, 70]}
    return Run("ours", {"ours": ours, "other": other}, machine | load)


def cells(table: str, name: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_ratio_is_of_the_same_round() -> None:
    assert ratio([100, 10, 30], [50, 10, 10]) == 2  # the medians alone would be 3
    assert ratio([100, 10, 30], [50, 10, 10], more_is_better=False) == 0.5


def test_the_spread_is_half_the_range_beside_the_median() -> None:
    assert spread([90, 100, 120]) == pytest.approx(0.15)
    assert spread([100]) == 0


def test_the_table_has_medians_spread_versions_and_reasons() -> None:
    table = show_table(made())
    assert cells(table, "ours")[:2] == ["ours, nats-server 2.15.1", "2,000 ±50 %"]
    assert "7 / 20 ±29 %" in cells(table, "ours")
    assert cells(table, "other")[3] == "–"
    assert (
        "* other (other 2.1, redis 8.1): keeps no results; bulk: no call adds many jobs." in table
    )


def test_a_ratio_above_one_says_that_ours_is_better() -> None:
    found = ratios(made(), "other")
    assert list(found.values()) == [3, 3]  # 2, 3, 4 as fast; 10, 1, 3 as late
    assert cells(show_ratios(made()), "other")[:4] == ["other", "3.00", "–", "–"]


def test_a_run_is_read_as_it_was_written() -> None:
    assert Run.from_json(made().to_json()) == made()


def test_a_table_is_renewed_between_its_marks_only() -> None:
    page = "before\n<!-- figures: x -->\nold\n<!-- end of figures -->\nafter\n"
    renewed = renew(page, "x", "new\n")
    assert renewed == page.replace("old\n", "\nnew\n\n")
    assert renew(renewed, "x", "new\n") == renewed
    with pytest.raises(ValueError, match="0 tables"):
        renew(page, "y", "new\n")


def test_the_pages_show_the_figures_that_are_kept() -> None:
    run = Run.from_json(pages.FIGURES.read_text())
    for page, (mark, show) in pages.PAGES.items():
        text = page.read_text()
        assert renew(text, mark, show(run)) == text, "python -m benchmarks.peers --read … --write"


def test_every_library_has_an_adapter_and_pinned_requirements() -> None:
    files = {path.name for path in ADAPTERS.iterdir() if path.suffix in (".py", ".mjs")}
    assert {peer.adapter for peer in PEERS} == files - {"adapter.py"}
    libraries = [peer.requires[0] for peer in PEERS if peer.requires]
    assert [name for name in libraries if "==" not in name and "@" not in name] == []


def test_an_adapter_of_ours_runs_in_this_environment() -> None:
    command, variables = adapter_command(OURS)
    assert command == [sys.executable, str(ADAPTERS / "ours.py")]
    assert Path(variables["PYTHONPATH"]) == ADAPTERS.parents[2]


@ON_LINUX
@pytest.mark.server
def test_the_workload_measures_ours_and_has_a_reason_for_each_gap(tmp_path: Path) -> None:
    steps: list[str] = []
    found = measure_round([OURS, RAW], TINY, tmp_path, steps.append)
    assert set(found) == {OURS.name, RAW.name}, (tmp_path / "ours.log").read_text()
    ours, raw = found[OURS.name], found[RAW.name]
    assert all(ours.figures[key] > 0 for key in (*JOBS_A_SECOND, *COSTS)), ours
    assert 0 <= ours.figures["late_p50"] <= ours.figures["late_p95"]
    assert ours.no_way == {}
    assert ours.server.startswith("nats-server ")
    assert set(raw.figures) == set(ours.figures) - set(raw.no_way)
    assert set(raw.no_way) == {"late_p50", "late_p95"}
    assert steps[1] == "add_one_by_one"


@ON_LINUX
@pytest.mark.server
def test_a_library_that_fails_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('no such library')")
    broken = Peer("broken", str(tmp_path / "broken.py"), "nats")
    assert measure_round([broken], TINY, tmp_path, lambda step: None) == {}
    assert "no such library" in (tmp_path / "broken.log").read_text()
