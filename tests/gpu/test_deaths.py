"""Engines that are killed on a GPU, and a run that is killed whole: no row is lost, and memory comes back in time."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.gpus import GPU_ENGINE, NUM_TOKENS, list_gpus
from helpers.jobs import Job, find_engine_pids, read_run_json, wait_for
from helpers.results import count_journal_bytes, load_all_rows
from helpers.tiny_model import write_large_cache_model

from dpgen.config.sections import ParallelConfig

pytestmark = [pytest.mark.gpu, pytest.mark.multi, pytest.mark.slow]

NUM_ROWS = 2_000
MIDDLE_BYTES = 100_000  # of some 400,000 in the journal


def wait_for_the_middle(job: Job, run_dir: Path) -> None:
    wait_for(lambda: count_journal_bytes(run_dir) > MIDDLE_BYTES or job.process.poll() is not None)
    assert job.process.poll() is None, job.output


def check_rows(run_dir: Path) -> None:
    rows = load_all_rows(run_dir, NUM_ROWS)
    assert {(row["error"], row["num_generated_tokens"]) for row in rows} == {(None, NUM_TOKENS)}


def test_a_killed_engine_is_restarted_and_its_rows_are_generated_again(
    take_gpus: Callable[..., list[str]],
    start_dpgen: Callable[..., Any],
    write_job: Callable[..., str],
    tmp_path: Path,
) -> None:
    job = start_dpgen(take_gpus(1), write_job(NUM_ROWS))
    wait_for_the_middle(job, tmp_path / "run")
    [engine, *_] = find_engine_pids(job)
    os.kill(engine, signal.SIGKILL)
    assert job.wait() == 0, job.output
    check_rows(tmp_path / "run")
    assert job.output.count("restarting it") == 1 and "engine restarted, resuming" in job.output, job.output


@pytest.mark.parametrize(
    ("ranks", "setting"),
    [
        pytest.param(2, "parallel.share_devices=true", id="two ranks that share a GPU"),
        pytest.param(1, "parallel.engines_per_rank=2", id="two engines of one rank"),
    ],
)
def test_one_of_two_engines_on_a_gpu_is_killed_and_the_other_goes_on(
    take_gpus: Callable[..., list[str]],
    start_dpgen: Callable[..., Any],
    write_job: Callable[..., str],
    tmp_path: Path,
    ranks: int,
    setting: str,
) -> None:
    key = setting.partition("=")[0]
    if not hasattr(ParallelConfig, key.removeprefix("parallel.")):
        pytest.skip(f"this version has no {key}")
    gpus = take_gpus(1, whole=True)
    engine = {**GPU_ENGINE, "load_format": "dummy"}
    del engine["kv_cache_memory_bytes"]  # the engines divide what vLLM takes by itself, some 92 % of the GPU
    conf = write_job(NUM_ROWS, model=str(write_large_cache_model(tmp_path / "model")), engine=engine)
    job = start_dpgen(gpus, conf, setting, ranks=ranks)
    wait_for_the_middle(job, tmp_path / "run")
    killed, other = find_engine_pids(job)
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: "restarting it" in job.output)
    assert other in find_engine_pids(job), "the other engine is not restarted"
    assert job.wait() == 0, job.output
    check_rows(tmp_path / "run")
    assert job.output.count("restarting it") == 1, job.output


def test_a_killed_run_resumes_with_the_same_command_on_more_gpus(
    take_gpus: Callable[..., list[str]],
    start_dpgen: Callable[..., Any],
    write_job: Callable[..., str],
    tmp_path: Path,
) -> None:
    gpus = take_gpus(min(2, len(list_gpus())))
    conf = write_job(NUM_ROWS)
    first = start_dpgen(gpus[:1], conf)
    wait_for_the_middle(first, tmp_path / "run")
    first.end()
    second = start_dpgen(gpus, conf, ranks=len(gpus))
    assert second.wait() == 0, second.output
    check_rows(tmp_path / "run")
    resumed = re.search(rf"attempt 2: ([\d,]+) of {NUM_ROWS:,} rows are done", second.output)
    assert resumed, second.output
    num_done = int(resumed[1].replace(",", ""))
    generated = sum(manifest["num_rows"] for manifest in read_run_json(tmp_path / "run")["manifests"])
    assert num_done > 0 and generated == NUM_ROWS - num_done, "finished rows are not generated again"
