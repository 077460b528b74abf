"""The table of benchmarks/gpu.py, of rows that take no time: what runs together, what a budget leaves out, the text."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.jobs import REPO

sys.path.append(str(REPO / "benchmarks"))

from gpu import GpuTable
from gpu_rows import BenchmarkRow, list_rows

MACHINE = {
    "cores": 64,
    "gpus": ["NVIDIA H100", "NVIDIA H100"],
    "python": "3.12.3",
    "versions": {"vllm": "0.26.0"},
    "commit": "abc",
    "date": "2026-11-27",
}
MEASURED = {
    "generate": {"tokens": 1_000, "seconds": 1.0, "tokens_per_s": 1_000.0},
    "dpgen": {
        "tokens": 1_000,
        "seconds": 0.5,
        "tokens_per_s": 2_000.0,
        "balance": 0.99,
        "is_complete": True,
        "wall_s": 1.0,
        "ready": "after 28 s",
    },
    "profile": {"sequences": 256, "step_ms": 8.5, "processor_ms": 8.7, "profiled_step_ms": 10.6, "kernels_ms": 3.5},
}


class InstantRunner:
    """Measure nothing, and note which rows run at the same time."""

    def __init__(self) -> None:
        self.together: list[set[str]] = []
        self.gpus: dict[str, list[str]] = {}
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def run(self, row: BenchmarkRow, gpus: Sequence[str], timeout_s: float) -> dict[str, Any]:
        with self._lock:
            self._running.add(row.name)
            self.together.append(set(self._running))
            self.gpus[row.name] = list(gpus)
        if "broken" in row.name:
            sys.exit("no such GPU")
        with self._lock:
            self._running.remove(row.name)
        return {**MEASURED[row.way], "gpu_busy": 0.33}

    def show_command(self, row: BenchmarkRow) -> str:
        return f"run {row.name}"


@pytest.mark.parametrize("num_gpus", [1, 4, 8])
def test_each_row_has_a_name_of_its_own_and_a_base_in_the_table(num_gpus: int) -> None:
    rows = list_rows(num_gpus)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert all(row.base in names for row in rows if row.base)
    assert {row.gpus for row in rows} == {1, num_gpus}
    assert all(row.size in ("1b", "8b") and row.estimate_s() > 0 for row in rows)
    assert (num_gpus > 1) == any(row.ranks == row.gpus > 1 for row in rows)
    assert all(row.num_rows >= row.ranks for row in list_rows(num_gpus, 0.001))


def test_a_row_of_all_gpus_runs_alone_and_others_side_by_side() -> None:
    runner = InstantRunner()
    rows = [BenchmarkRow("1b-a"), BenchmarkRow("1b-b"), BenchmarkRow("1b-both", "x", gpus=2), BenchmarkRow("1b-c")]
    table = GpuTable(runner, ["3", "5"], None)  # type: ignore[arg-type]
    table.run(rows)
    assert list(table.measured) and set(table.measured) == {row.name for row in rows}
    assert runner.gpus["1b-both"] == ["3", "5"]
    assert all(names == {"1b-both"} for names in runner.together if "1b-both" in names)


def test_a_budget_leaves_out_the_rows_that_would_not_end_in_time() -> None:
    runner = InstantRunner()
    long, short = BenchmarkRow("8b-long", num_rows=10**6), BenchmarkRow("8b-short", num_rows=10)
    table = GpuTable(runner, ["0"], 60.0)  # type: ignore[arg-type]
    table.run([long, short])
    assert "takes about" in table.measured["8b-long"]["not_run"] and list(runner.gpus) == ["8b-short"]
    assert "Not measured: 8b-long, it takes about" in table.format([long, short], MACHINE)


def test_the_table_says_ratios_hardware_commands_and_what_failed() -> None:
    rows = [
        BenchmarkRow("1b-generate", "`LLM.generate()`", "generate"),
        BenchmarkRow("1b-dpgen", "dpgen", base="1b-generate"),
        BenchmarkRow("1b-ranks", "two ranks", ranks=2, gpus=2, base="1b-dpgen", base_factor=2),
        BenchmarkRow("1b-profile", "a step", "profile"),
        BenchmarkRow("1b-broken", "broken"),
    ]
    table = GpuTable(InstantRunner(), ["0", "1"], None)  # type: ignore[arg-type]
    table.run(rows)
    text = table.format(rows, MACHINE)
    assert text.startswith("2 x NVIDIA H100, 64 cores; vllm 0.26.0, Python 3.12.3; commit abc, 2026-11-27.")
    assert "| `LLM.generate()` | 1,000 | GPU busy 0.01 |" in text
    assert "| dpgen | 2,000 | 2.00 times 1b-generate; GPU busy 0.03; whole job 1.0 s, 0.5 s generating" in text
    assert "| two ranks | 2,000 | 0.500 of 2 x 1b-dpgen; balance 0.990; GPU busy 0.01; whole job 1.0 s" in text
    assert "| a step | 8.5 ms | 8.7 ms | 3.5 ms of 10.6 | 0.33 |" in text
    assert "Not measured: 1b-broken, it failed." in text
    assert "run 1b-dpgen    # 1b-dpgen" in text and "run 1b-broken" not in text
