"""Run a short series of random faults; `python tests/chaos.py --faults 1000` runs a long one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from helpers.chaos.faults import KINDS
from helpers.chaos.rank import HOOKS, MEETING_HOOK
from helpers.chaos.series import make_schedule
from helpers.jobs import REPO, Launcher

NUM_FAULTS = 60  # on the fake engine


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "faults", "workers", "kinds"),
    [
        pytest.param("fake", NUM_FAULTS, 3, ",".join(KINDS), id="fake"),
        pytest.param("vllm", 4, 1, "kill_engine,kill_rank_0,stop_engine,lose_while_writing", marks=pytest.mark.vllm),
    ],
)
def test_random_faults_lose_duplicate_and_change_no_row(
    launcher: Launcher, tmp_path: Path, engine: str, faults: int, workers: int, kinds: str
) -> None:
    arguments = ["--engine", engine, "--faults", str(faults), "--workers", str(workers), "--kinds", kinds]
    job = launcher.start([launcher.python, str(REPO / "tests" / "chaos.py"), *arguments])
    assert job.wait(590) == 0, job.output
    assert json.loads(job.output.strip().splitlines()[-1])["num_faults"] == faults


def test_a_short_series_has_every_kind_of_fault() -> None:
    assert set(make_schedule(list(KINDS), "fake", NUM_FAULTS, seed=0)) == set(KINDS)


@pytest.mark.parametrize(("module", "path"), [*HOOKS.values(), MEETING_HOOK])
def test_each_phase_begins_with_a_function_that_exists(module: str, path: str) -> None:
    owner = importlib.import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)
    assert callable(owner)
