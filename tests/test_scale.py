"""The counts of benchmarks/scale.py with few ranks and rows, so that the program keeps working and its counts hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO, Launcher


def run_scale(launcher: Launcher, work_dir: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Return the figures by name; the program ends with status 1 if a count is over its budget."""
    program = [str(REPO / "benchmarks" / "scale.py"), "--counts-only", "--json", "--dir", str(work_dir)]
    job = launcher.start([launcher.python, *program, *arguments], OMP_NUM_THREADS="1")
    status = job.wait()
    assert status == 0, job.output
    record = json.loads(job.output.splitlines()[-1])
    return {figure["name"]: figure for figure in record["found"]}


@pytest.mark.multi
@pytest.mark.slow
def test_a_small_group_costs_the_store_what_the_law_says(launcher: Launcher, tmp_path: Path) -> None:
    sizes = ["--processes", "4,8", "--forming", "24", "--watched", "24", "--seconds", "0.5"]
    figures = run_scale(launcher, tmp_path, "--only", "ranks", *sizes)
    for num_ranks in (4, 8):
        title = f"forming a group of {num_ranks} real ranks"
        # Ranks that wait for each other ask the store twice a second, so a busy machine sees more.
        assert 500 < 1e3 * figures[f"{title}: through rank 0's store"]["value"] / num_ranks < 2_000
        assert figures[f"{title}: rank 0's files"]["value"] < 18 + 4 * num_ranks
    title = "forming a group of 24 stand-ins"
    assert figures[f"{title}: through rank 0's store"]["value"] < 0.05
    assert 24 * 8 < figures[f"{title}: messages to it"]["value"] < 24 * 50


@pytest.mark.slow
def test_plans_read_no_prompt_twice_and_a_result_opens_each_segment_once(launcher: Launcher, tmp_path: Path) -> None:
    figures = run_scale(
        launcher, tmp_path, "--only", "rows", "--rows", "6000", "--segments", "70", "--rows-per-segment", "60"
    )
    assert [figure["value"] for name, figure in figures.items() if "prompts read again" in name] == [0] * 4
    assert figures["reading prompts and journals for a plan: rows between two heartbeats"]["value"] <= 1000
    title = "writing 4,200 rows from 70 segments"
    assert figures[f"{title}: opens per segment, in 3 batches"]["value"] == 1
