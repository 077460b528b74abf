"""Engines that fail without dying at once: sick ones, and kills from outside. No good row becomes `poison_row`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers.jobs import Launcher, WriteConfig, find_engine_pids, load_result, make_numbered_rows, wait_for
from helpers.results import load_all_rows

pytestmark = pytest.mark.multi


def count_engine_starts(run_dir: Path, rank: int) -> int:
    return (run_dir / "logs" / f"rank-{rank}.engine.log").read_text().count("dpgen: engine life")


@pytest.mark.slow
def test_a_sick_engine_is_abandoned_and_poisons_no_row(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200))
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[["engine.step_s=0.01"], ["engine.raise_on=row"]])
    assert [job.wait() for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    assert all(row["error"] is None for row in load_all_rows(tmp_path / "run", 200))
    assert "abandoning it after" in jobs[1].output
    assert count_engine_starts(tmp_path / "run", rank=1) <= 9


def test_an_engine_that_fails_while_the_rank_prepares_is_reported_in_its_own_words(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(5), engine={"load_error": "no such device"}))
    assert job.wait() == 1
    failures = [line for line in job.output.splitlines() if "the engine" in line]
    assert len(failures) == 3 and all("the engine failed: RuntimeError: no such device" in line for line in failures)
    assert "Traceback" not in job.output and "exited with status" not in job.output, job.output


@pytest.mark.slow
def test_one_rank_finds_its_only_poison_row(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(24), engine={"raise_on": "number 7"}))
    assert job.wait() == 0, job.output
    errors = {row["row_id"]: row["error"]["type"] for row in load_result(tmp_path / "run") if row["error"]}
    assert errors == {7: "poison_row"}


@pytest.mark.slow
def test_a_row_that_livelocks_its_engine_is_recorded_and_the_run_continues(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        make_numbered_rows(12),
        run={"engine_timeout_s": 2},
        engine={"livelock_on": "number 7", "max_num_seqs": 1},
        work={"reserve_rows": 1},
    )
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    assert "the engine made no progress for" in job.output
    errors = {row["row_id"]: row["error"] for row in load_result(tmp_path / "run") if row["error"]}
    assert list(errors) == [7]
    assert errors[7]["type"] == "poison_row" and "made no progress" in errors[7]["message"]


@pytest.mark.slow
def test_two_kills_from_outside_leave_all_rows_running_together(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(30), engine={"step_s": 0.1, "max_num_seqs": 24}, sampling={"max_tokens": 60})
    job = launcher.dpgen("run", conf)
    for life in (1, 2):
        wait_for(lambda life=life: job.output.count("engine restarted") == life - 1 and "KV cache" in job.output)
        [pid] = find_engine_pids(job)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda life=life: job.output.count("engine restarted") == life)
    assert job.wait(90) == 0, "one by one, 24 rows of 6 s each would take longer:\n" + job.output
    assert count_engine_starts(tmp_path / "run", rank=0) == 3
    assert all(row["error"] is None for row in load_all_rows(tmp_path / "run", 30))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.multi)])
def test_a_run_whose_only_remaining_rows_are_poison_records_them(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, ranks: int
) -> None:
    rows = [{"prompt": "good"}, {"prompt": "also good"}, {"prompt": "poison"}]
    conf = write_config(rows, engine={"raise_on": "poison"})
    first = launcher.dpgen("run", conf, "data.limit=2")
    assert first.wait() == 0, first.output
    job = launcher.dpgen("run", conf, ranks=ranks)
    assert job.wait() == 0, job.output
    results = load_result(tmp_path / "run")
    assert [row["error"] and row["error"]["type"] for row in results] == [None, None, "poison_row"]
