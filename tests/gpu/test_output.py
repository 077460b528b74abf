"""What a run on GPUs prints: dpgen's own lines, and nothing of vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.gpus import find_noise, list_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.multi, pytest.mark.slow]


def test_a_run_with_compiled_code_and_cuda_graphs_is_quiet(
    take_gpus: Callable[..., list[str]], start_dpgen: Callable[..., Any], write_job: Callable[..., str], tmp_path: Path
) -> None:
    gpus = take_gpus(min(2, len(list_gpus())))
    job = start_dpgen(gpus, write_job(100), "engine.enforce_eager=false", "engine.max_num_seqs=8", ranks=len(gpus))
    assert job.wait() == 0, job.output
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "logs").iterdir())
    assert "Capturing CUDA graphs" in logs, "the rank's log file has what the terminal has not"
    assert find_noise(job.output) == []
