"""Whole runs as `dpgen status` sees them: starting, live, killed, stopped, finished."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Launcher, WriteConfig, descendants, make_numbered_rows, wait_for

from dpgen.monitoring.status.history import read_history
from dpgen.monitoring.status.record import read_records
from dpgen.monitoring.status.run_status import RunStatus, RunWatcher

SLOW = {"step_s": 0.05, "max_num_seqs": 2}


def read_status(run_dir: Path) -> RunStatus | None:
    watcher = RunWatcher(run_dir)
    return watcher.read() if watcher.has_run else None


def wait_for_rows(run_dir: Path, num_ranks: int = 1) -> RunStatus:
    """Wait until each rank is live and has finished rows, and return the status then."""
    seen: list[RunStatus] = []

    def has_rows() -> bool:
        status = read_status(run_dir)
        seen[:] = [] if status is None else [status]
        views = [] if status is None else status.ranks
        return sum(view.state == "live" and view.counts.num_rows > 0 for view in views) == num_ranks

    wait_for(has_rows)
    return seen[0]


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_is_live_then_dead_then_live_then_stopped_then_finished(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    rows: list[dict[str, Any]] = [{"prompt": None}, *make_numbered_rows(199)]
    conf = write_config(rows, engine=SLOW, sampling={"max_tokens": 10})
    job = launcher.dpgen("run", conf, ranks=2)
    status = wait_for_rows(run_dir, num_ranks=2)
    assert (status.state, status.attempt, status.num_ranks, status.num_rows) == ("live", 1, 2, 200)
    assert status.num_done and [kind.type for kind in status.errors] == ["wrong_type"]
    for pid in [*descendants(job.process.pid, b"dpgen"), job.process.pid]:
        os.kill(pid, signal.SIGKILL)
    job.wait()
    wait_for(lambda: (read_status(run_dir) or status).state == "dead")

    job = launcher.dpgen("run", conf)
    status = wait_for_rows(run_dir)
    assert (status.state, status.attempt, status.num_ranks) == ("live", 2, 1), "the dead attempt's ranks do not count"
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    stopped = read_status(run_dir)
    assert stopped is not None and (stopped.state, stopped.exit_status) == ("stopped", 75)
    assert stopped.reason is not None and "SIGTERM" in stopped.reason

    command = launcher.dpgen("status", str(run_dir), "--json")
    assert command.wait() == 75
    assert json.loads(command.output)["num_done"] == stopped.num_done

    assert launcher.dpgen("run", conf, "engine.step_s=0").wait() == 0
    finished = read_status(run_dir)
    assert finished is not None and (finished.state, finished.num_done, finished.num_errors) == ("finished", 200, 1)
    again = launcher.dpgen("run", conf)
    assert again.wait() == 0, again.output
    assert read_status(run_dir) == finished, "a start that finds its result leaves the status as it is"
    phases = [s["phase"] for s in read_history(run_dir / "status" / "rank-0.history.jsonl") if s.get("is_change")]
    assert {"planning", "loading the model", "generating", "writing the result", "finished"} <= set(phases)


@pytest.mark.multi
def test_ranks_that_wait_for_another_show_before_the_run_directory_exists(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Rank 1 of two never comes."""
    conf = write_config(make_numbered_rows(4))
    environment = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    [job] = launcher.start_like_srun("run", conf, rank_arguments=[[]], **environment)
    wait_for(lambda: (status := read_status(tmp_path / "run")) is not None and status.state == "starting")
    status = read_status(tmp_path / "run")
    assert status is not None and [view.rank for view in status.waits_for] == [1]
    assert [view.phase for view in status.ranks] == ["joining the other ranks", ""]
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert not (tmp_path / "run").exists(), "a start that began no attempt leaves nothing"


@pytest.mark.multi
def test_a_failed_run_says_why(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config([{"prompt": None}] * 4)
    assert launcher.dpgen("run", conf).wait() == 1
    status = read_status(tmp_path / "run")
    assert status is not None and (status.state, status.exit_status) == ("failed", 1)
    assert status.reason is not None and "no row succeeded" in status.reason


@pytest.mark.multi
def test_a_rejected_configuration_leaves_no_directory(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(4))
    job = launcher.dpgen("run", conf, "output.track=[tensorboard,wandb]", PYTHONPATH=block_packages(tmp_path))
    assert job.wait() == 2, job.output
    assert "tensorboard needs the package tensorboard" in job.output and "pip install wandb" in job.output
    assert not (tmp_path / "run").exists()


def block_packages(folder: Path) -> str:
    """Return a PYTHONPATH on which the trackers' packages can't be imported, installed or not."""
    from helpers.jobs import REPO

    blocked = folder / "blocked"
    blocked.mkdir()
    for name in ("tensorboard", "wandb"):
        (blocked / f"{name}.py").write_text("raise ImportError('blocked')\n")
    return f"{blocked}:{REPO}"


@pytest.mark.multi
def test_a_status_directory_that_can_not_be_written_costs_no_row(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status").write_text("")
    job = launcher.dpgen("run", write_config(make_numbered_rows(20)))
    assert job.wait() == 0, job.output
    assert job.output.count("status can't be written") == 1
    status = read_status(tmp_path / "run")
    assert status is not None and (status.state, status.num_done) == ("finished", 20)


@pytest.mark.multi
@pytest.mark.slow
def test_a_line_for_each_rank_and_rows_at_the_end_are_logged_on_request(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{'long ' * 100}\x1b[31mrow {index}\n"} for index in range(30)]
    conf = write_config(rows, engine={**SLOW, "max_model_len": 2048}, sampling={"max_tokens": 10})
    arguments = ["run.progress=ranks", "run.progress_interval_s=0.2", "run.show_rows=2", "output.track=[prometheus]"]
    job = launcher.dpgen("run", conf, *arguments)
    assert job.wait() == 0, job.output
    lines = re.findall(r"INFO \[rank 0\] rank 0 on \S+: generating, (\d+) rows?, .*, (\d+) running, ", job.output)
    assert len(lines) >= 2 and int(lines[-1][0]) > 0, job.output
    shown = re.findall(
        r'row (\d+): "\.\.\.[long ]+\\x1b\[31mrow (\d+)\\n" → "\w+-0 10" \(length, 10 tokens\)', job.output
    )
    assert len(shown) == 2 and all(first == second for first, second in shown), job.output
    assert "\x1b" not in job.output
    assert "dpgen_rows_done_total 30.0" in (tmp_path / "run" / "status" / "metrics.prom").read_text()
    [record] = read_records(tmp_path / "run" / "status")
    assert record.state == "finished" and record.counts.num_rows == 30
