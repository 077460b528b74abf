"""Several engines on a rank: the result of one, each row once, and each engine dies alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Job, Launcher, WriteConfig, find_engine_pids, make_numbered_rows, read_run_json, wait_for
from helpers.results import count_journal_bytes, load_all_rows

pytestmark = pytest.mark.multi

SLOW = {"step_s": 0.02, "max_num_seqs": 4}


def read_num_engines(run_dir: Path, rank: int = 0) -> int:
    """Return how many engines of a rank have loaded the model, as the rank says."""
    path = run_dir / "status" / f"rank-{rank}.json"
    counts: dict[str, Any] = json.loads(path.read_text())["counts"] if path.exists() else {}
    return int(counts.get("num_engines", 0))


def read_texts(run_dir: Path, count: int) -> list[str]:
    return [row["generated_text"] for row in load_all_rows(run_dir, count)]


def read_lives(log: Path) -> int:
    return log.read_text().count("dpgen: engine life")


def find_engine(job: Job, log: Path) -> int:
    """Return the id of the newest process of an engine, by its log file."""
    line = [line for line in log.read_text().splitlines() if "dpgen: engine life" in line][-1]
    pid = int(line.rpartition("pid ")[2])
    assert pid in find_engine_pids(job)
    return pid


@pytest.mark.slow
def test_a_run_says_how_many_engines_it_has_where_one_does_not_start(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(120), engine={**SLOW, "load_s": 1.0})
    job = launcher.dpgen("run", conf, "parallel.engines_per_rank=2", "sampling.max_tokens=20")
    second = tmp_path / "run" / "logs" / "rank-0.engine-1.log"
    for num_starts in (1, 2, 3):
        wait_for(lambda num_starts=num_starts: second.exists() and read_lives(second) == num_starts)
        os.kill(find_engine(job, second), signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert job.output.count("was killed by SIGKILL, restarting it, see") == 2 == read_lives(second) - 1
    assert "was killed by SIGKILL, abandoning it after 3 deaths in a row, see" in job.output
    assert "1 engine a rank: parallel.engines_per_rank=2; engine 1 does not start" in job.output
    assert read_run_json(tmp_path / "run")["engines_per_rank"]["number"] == 1


@pytest.mark.slow
def test_an_engine_whose_load_stalls_does_not_hold_up_the_one_that_generated(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(240), engine={**SLOW, "load_s": 5.0})
    job = launcher.dpgen("run", conf, "parallel.engines_per_rank=2", "sampling.max_tokens=20")
    logs = tmp_path / "run" / "logs"
    wait_for(lambda: read_num_engines(tmp_path / "run") == 1)
    os.kill(find_engine(job, logs / "rank-0.engine-1.log"), signal.SIGSTOP)
    os.kill(find_engine(job, logs / "rank-0.engine.log"), signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert job.output.count("until engine 1 is") == 1, "why the rank generates nothing"
    assert "the engine has not loaded the model within" in job.output
    assert "engine restarted, resuming" in job.output
    assert len(read_texts(tmp_path / "run", 240)) == 240


@pytest.mark.slow
def test_two_engines_give_the_result_of_one_whatever_dies(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(240), engine=SLOW)
    job = launcher.dpgen("run", conf, "parallel.engines_per_rank=2", "sampling.max_tokens=20")
    run_dir, second = tmp_path / "run", tmp_path / "run" / "logs" / "rank-0.engine-1.log"
    wait_for(lambda: read_num_engines(run_dir) == 2 and second.exists())
    os.kill(find_engine(job, second), signal.SIGKILL)
    before = count_journal_bytes(run_dir)
    wait_for(lambda: count_journal_bytes(run_dir) > before)
    assert job.wait() == 0, job.output
    assert job.output.count("was killed by SIGKILL, restarting it, see") == 1 and str(second) in job.output
    assert "2 engines a rank: parallel.engines_per_rank=2" in job.output
    assert read_run_json(run_dir)["engines_per_rank"]["number"] == 2
    one = launcher.dpgen("run", conf, f"run.dir={tmp_path / 'one'}", "sampling.max_tokens=20", "engine.step_s=0")
    assert one.wait() == 0, one.output
    assert read_texts(run_dir, 240) == read_texts(tmp_path / "one", 240)
    assert not (tmp_path / "one" / "logs" / "rank-0.engine-1.log").exists()


@pytest.mark.slow
def test_all_engines_of_a_rank_may_be_killed_at_once(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), engine=SLOW, parallel={"engines_per_rank": 3})
    job = launcher.dpgen("run", conf, "sampling.max_tokens=20")
    wait_for(lambda: read_num_engines(tmp_path / "run") == 3)
    for pid in find_engine_pids(job):
        os.kill(pid, signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert all(row["error"] is None for row in load_all_rows(tmp_path / "run", 300))
    assert job.output.count("was killed by SIGKILL, restarting it") == 3


@pytest.mark.slow
def test_two_ranks_of_two_engines_resume_what_a_stop_has_left(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), engine=SLOW, parallel={"engines_per_rank": 2})
    run_dir = tmp_path / "run"
    job = launcher.dpgen("run", conf, "sampling.max_tokens=20", ranks=2)
    wait_for(lambda: read_num_engines(run_dir) == read_num_engines(run_dir, 1) == 2)
    assert len(find_engine_pids(job)) == 4
    os.kill(job.process.pid, signal.SIGTERM)
    job.wait()
    again = launcher.dpgen(
        "run", conf, "sampling.max_tokens=20", "engine.step_s=0", "parallel.engines_per_rank=1", ranks=2
    )
    assert again.wait() == 0, again.output
    assert "attempt 2: " in again.output, "the number of engines is no part of what a run is"
    assert all(row["error"] is None for row in load_all_rows(run_dir, 300))


@pytest.mark.slow
def test_a_poison_row_costs_one_row_and_one_engine_at_a_time(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        make_numbered_rows(60), engine={"raise_on": "number 37", "step_s": 0.005}, parallel={"engines_per_rank": 2}
    )
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    rows = load_all_rows(tmp_path / "run", 60)
    assert {row["row_id"]: row["error"]["type"] for row in rows if row["error"]} == {37: "poison_row"}


@pytest.mark.slow
def test_auto_starts_engines_where_the_processor_is_the_limit_and_says_why(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    engine = {"processor_s": 0.008, "kernel_s": 0.003, "device_lock": str(tmp_path / "device"), "max_num_seqs": 4}
    conf = write_config(make_numbered_rows(20_000), engine=engine)
    job = launcher.dpgen("run", conf, "sampling.max_tokens=30")
    wait_for(lambda: read_num_engines(tmp_path / "run") > 1)
    facts = read_run_json(tmp_path / "run")["engines_per_rank"]
    assert facts["number"] in (2, 3, 4) and facts["processor_ms"] == pytest.approx(8, abs=0.5)
    assert f"{facts['number']} engines a rank: a step of 4 sequences takes" in job.output
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.wait() == 75, job.output


def test_several_engines_are_refused_where_an_engine_has_several_gpus(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    job = launcher.dpgen(
        "run", write_config([{"prompt": "x"}]), "parallel.engines_per_rank=2", "parallel.tensor_parallel_size=2"
    )
    assert job.wait() == 2
    assert "parallel.engines_per_rank=2: must be auto or 1 with parallel.tensor_parallel_size=2" in job.output
    job = launcher.dpgen("run", write_config([{"prompt": "x"}]), "parallel.engines_per_rank=many")
    assert job.wait() == 2
    assert "parallel.engines_per_rank='many': must be auto, or a whole number of at least 1" in job.output
