"""The demo in every layout: over all GPUs of this machine, each answer is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.gpus import find_noise, list_gpus
from helpers.jobs import Launcher

pytestmark = [pytest.mark.gpu, pytest.mark.multi, pytest.mark.slow]


@dataclass(frozen=True)
class LayoutCase:
    """One way to put copies of a model on GPUs; as many copies run as this machine has GPUs for.

    Attributes:
        min_copies: fewer make no such layout.
    """

    tensor: int = 1
    pipeline: int = 1
    is_external: bool = False
    is_lockstep: bool = False
    min_copies: int = 1

    @property
    def gpus_per_copy(self) -> int:
        return self.tensor * self.pipeline

    @property
    def settings(self) -> list[str]:
        return [
            f"parallel.tensor_parallel_size={self.tensor}",
            f"parallel.pipeline_parallel_size={self.pipeline}",
            f"parallel.launcher={'external' if self.is_external else 'internal'}",
            f"parallel.lock_step={str(self.is_lockstep).lower()}",
        ]


LAYOUTS = {
    "DP": LayoutCase(),
    "TP 2": LayoutCase(tensor=2),
    "PP 2": LayoutCase(pipeline=2),
    "TP 4": LayoutCase(tensor=4),
    "TP 2 x PP 2": LayoutCase(tensor=2, pipeline=2),
    "external TP 2": LayoutCase(tensor=2, is_external=True),
    "external PP 2": LayoutCase(pipeline=2, is_external=True),
    "external TP 4": LayoutCase(tensor=4, is_external=True),
    "lockstep": LayoutCase(is_external=True, is_lockstep=True, min_copies=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_answers_all_of_the_demo(
    launcher: Launcher,
    take_gpus: Callable[..., list[str]],
    start_dpgen: Callable[..., Any],
    tmp_path: Path,
    name: str,
) -> None:
    layout = LAYOUTS[name]
    num_copies = max(layout.min_copies, len(list_gpus()) // layout.gpus_per_copy)
    gpus = take_gpus(num_copies * layout.gpus_per_copy)
    ranks = len(gpus) if layout.is_external else num_copies
    run_dir = tmp_path / "run"
    job = start_dpgen(
        gpus, "conf/demo.yaml", f"run.dir={run_dir}", "engine.dtype=bfloat16", *layout.settings, ranks=ranks
    )
    assert job.wait() == 0, job.output
    shown = launcher.start([launcher.python, "launch/show_demo.py", str(run_dir)])
    assert shown.wait() == 0, shown.output
    score = re.search(r"(\d+) of 512 answers are right", shown.output)
    assert score and int(score[1]) == 512, shown.output
    assert find_noise(job.output) == []
