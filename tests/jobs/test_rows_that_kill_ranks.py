"""Rows whose rendering kills or hangs the rank itself: each is found and recorded, and all other rows are generated."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers.jobs import REPO, Launcher, WriteConfig, make_numbered_rows
from helpers.results import load_all_rows

pytestmark = [pytest.mark.multi, pytest.mark.slow]

# Python imports this module in every process. It gives one row's rendering the fault of a broken native tokenizer.
BROKEN_RENDERER = """
import os, signal, time
from dpgen.data.prompts.render import PromptRenderer

build_prompt = PromptRenderer.build_prompt

def break_down(self, row):
    prompt = build_prompt(self, row)
    if prompt == {prompt!r}:
        {fault}
    return prompt

PromptRenderer.build_prompt = break_down
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
HANG = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); time.sleep(3600)"


@pytest.fixture
def python_path(tmp_path: Path) -> str:
    (tmp_path / "broken").mkdir()
    return f"{tmp_path / 'broken'}:{REPO}"


def break_row(tmp_path: Path, prompt: str, fault: str) -> None:
    (tmp_path / "broken" / "sitecustomize.py").write_text(BROKEN_RENDERER.format(prompt=prompt, fault=fault))


def test_a_row_that_kills_its_process_twice_is_recorded_at_the_third_start(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, python_path: str
) -> None:
    break_row(tmp_path, "row number 2", KILL)
    # The first process dies while it orders the rows, the second one while it renders them.
    conf = write_config(make_numbered_rows(12), work={"order": "longest_first"})
    statuses = []
    for _ in range(3):
        job = launcher.dpgen("run", conf, PYTHONPATH=python_path)
        statuses.append(job.wait())
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0], job.output
    assert "row 2: 2 processes died while they were rendering this row, recording error render_crashed" in job.output
    assert find_errors(tmp_path) == {2: "render_crashed"}
    assert not list((tmp_path / "run" / "journal").glob(".note-attempt-0003*")), "a rank that ends removes its note"


def test_a_row_that_kills_two_ranks_under_srun_is_recorded_by_the_third(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, python_path: str
) -> None:
    break_row(tmp_path, "row number 2", KILL)
    conf = write_config(make_numbered_rows(30), work={"order": "dataset", "claim_rows": 1, "steal": False})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], [], []], PYTHONPATH=python_path, DPGEN_LEASE_S="8")
    statuses = [job.wait() for job in jobs]
    if statuses[0] != 0:  # rank 0 was the second one to take the row
        assert statuses == [-signal.SIGKILL, 75, -signal.SIGKILL]
        assert launcher.dpgen("run", conf, PYTHONPATH=python_path).wait() == 0
    assert find_errors(tmp_path) == {2: "render_crashed"}


def test_a_row_that_hangs_a_rank_is_recorded_and_the_other_ranks_continue(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, python_path: str
) -> None:
    break_row(tmp_path, "row number 1", HANG)
    conf = write_config(
        make_numbered_rows(12), data={"render_timeout_s": 0.5}, work={"order": "dataset", "steal": False}
    )
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], []], PYTHONPATH=python_path, DPGEN_LEASE_S="8")
    assert [job.wait() for job in jobs] == [0, 75], "".join(job.output for job in jobs)
    assert "rendering row 1 has taken 40 s and can't be interrupted" in jobs[1].output
    assert find_errors(tmp_path) == {1: "render_timeout"}, "one rank is enough"


def find_errors(tmp_path: Path) -> dict[int, str]:
    num_rows = len((tmp_path / "rows.jsonl").read_text().splitlines())
    return {row["row_id"]: row["error"]["type"] for row in load_all_rows(tmp_path / "run", num_rows) if row["error"]}
