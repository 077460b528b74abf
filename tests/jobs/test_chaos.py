"""Run a short series of random kills; `python tests/chaos.py --kills 1000` runs a long one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.jobs import REPO, Launcher

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.mark.parametrize(
    ("engine", "kills", "rows"),
    [("fake", 40, 600), pytest.param("vllm", 3, 200, marks=pytest.mark.vllm)],
)
def test_random_kills_lose_duplicate_and_change_no_row(
    launcher: Launcher, tmp_path: Path, engine: str, kills: int, rows: int
) -> None:
    arguments = ["--engine", engine, "--kills", str(kills), "--rows", str(rows)]
    job = launcher.start([launcher.python, str(REPO / "tests" / "chaos.py"), *arguments])
    assert job.wait(580) == 0, job.output
    assert json.loads(job.output.strip().splitlines()[-1])["num_kills"] == kills
