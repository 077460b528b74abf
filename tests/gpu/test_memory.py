"""Memory of a GPU that another process holds: a run goes on with what is free, or says what to write."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.gpus import GPU_ENGINE, hold_memory
from helpers.jobs import read_run_json
from helpers.results import load_all_rows
from helpers.tiny_model import write_large_cache_model

from dpgen.config.sections import ParallelConfig

pytestmark = [pytest.mark.gpu, pytest.mark.multi, pytest.mark.slow]

HELD_FRACTION = 0.5
MEASURING_ENGINE = {**GPU_ENGINE, "load_format": "dummy"}
del MEASURING_ENGINE["kv_cache_memory_bytes"]


@pytest.fixture
def write_memory_job(write_job: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Write a configuration whose engine measures the memory that it gets, and return its path."""

    def write(num_rows: int, **engine: Any) -> str:
        model = write_large_cache_model(tmp_path / "model")
        one_engine = {"engines_per_rank": 1} if hasattr(ParallelConfig, "engines_per_rank") else {}
        return write_job(num_rows, model=str(model), engine={**MEASURING_ENGINE, **engine}, parallel=one_engine)

    return write


def test_a_run_goes_on_with_the_memory_that_others_leave(
    take_gpus: Callable[..., list[str]],
    start_dpgen: Callable[..., Any],
    write_memory_job: Callable[..., str],
    tmp_path: Path,
) -> None:
    [gpu] = take_gpus(1, whole=True)
    with hold_memory(gpu, HELD_FRACTION):
        job = start_dpgen([gpu], write_memory_job(40))
        assert job.wait() == 0, job.output
    load_all_rows(tmp_path / "run", 40)
    lines = re.findall(r"only ([\d.]+) of ([\d.]+) GiB are free .* with gpu_memory_utilization=([\d.]+)", job.output)
    assert len(lines) == 1, f"one line says so\n{job.output}"
    free_gib, total_gib, fraction = map(float, lines[0])
    assert 0 < free_gib < (1 - HELD_FRACTION) * total_gib
    kv_cache_gib = read_run_json(tmp_path / "run")["engine"]["kv_cache_bytes"] / 2**30
    assert 0.5 * free_gib < kv_cache_gib < fraction * total_gib, "what is free is used"


def test_a_limit_of_the_user_that_does_not_fit_ends_the_run_with_what_to_write(
    take_gpus: Callable[..., list[str]], start_dpgen: Callable[..., Any], write_memory_job: Callable[..., str]
) -> None:
    [gpu] = take_gpus(1, whole=True)  # it holds memory that other tests would need
    with hold_memory(gpu, HELD_FRACTION):
        job = start_dpgen([gpu], write_memory_job(40, gpu_memory_utilization=0.9))
        assert job.wait() == 75, job.output
    advice = re.findall(r"set engine\.gpu_memory_utilization=([\d.]+) or lower", job.output)
    assert len(advice) == 1, f"one error\n{job.output}"
    assert 0.3 < float(advice[0]) < 1 - HELD_FRACTION


def test_ranks_on_unequal_gpus_agree_on_the_smaller_kv_cache(
    take_gpus: Callable[..., list[str]],
    start_dpgen: Callable[..., Any],
    write_memory_job: Callable[..., str],
    tmp_path: Path,
) -> None:
    gpus = take_gpus(2, whole=True)
    with hold_memory(gpus[1], HELD_FRACTION):
        job = start_dpgen(gpus, write_memory_job(400), ranks=2)
        assert job.wait() == 0, job.output
    load_all_rows(tmp_path / "run", 400)
    sizes = re.search(r"on every rank \(([\d,]+) MiB of ([\d,]+) MiB free here\)", job.output)
    assert sizes, job.output
    agreed_mib, measured_mib = (int(size.replace(",", "")) for size in sizes.groups())
    assert 0.3 * measured_mib < agreed_mib < 0.7 * measured_mib, (
        "rank 0 has a GPU of its own, and takes as much as rank 1"
    )
    num_rows = [manifest["num_rows"] for manifest in read_run_json(tmp_path / "run")["manifests"]]
    assert all(num_rows), f"both ranks generate: {num_rows}"
