"""Reserve GPUs for each test, and skip with a reason what this machine has no GPUs for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.gpus import GPU_ENGINE, NUM_TOKENS, find_obstacle, list_gpus, reserve_gpus
from helpers.jobs import REPO, Launcher, write_into
from helpers.requirements import skip_or_fail


@pytest.fixture(autouse=True)
def need_gpus(request: pytest.FixtureRequest) -> None:
    """Skip a test marked `gpu` where no GPU can be used, or fail it if DPGEN_REQUIRE_GPU is set."""
    if request.node.get_closest_marker("gpu") and (obstacle := find_obstacle()):
        skip_or_fail(obstacle, "DPGEN_REQUIRE_GPU")


@pytest.fixture
def take_gpus(need_gpus: None) -> Iterator[Callable[..., list[str]]]:
    """Return a function that reserves GPUs until the test ends, or skips the test if there are too few."""
    with contextlib.ExitStack() as reserved:

        def take(count: int, *, whole: bool = False) -> list[str]:
            gpus = list_gpus()
            if len(gpus) < count:
                pytest.skip(f"needs {count} GPUs, this machine has {len(gpus)}")
            return reserved.enter_context(reserve_gpus(gpus, count, whole=whole))

        yield take


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[..., str]:
    """Write a configuration for rows that each take 100 tokens of the demo's model, changed by section."""

    def write(num_rows: int, **sections: Any) -> str:
        rows = [{"prompt": f"{row} + 1"} for row in range(num_rows)]
        base: dict[str, Any] = {
            "run": {"engine": "vllm"},
            "model": str(REPO / "conf" / "demo" / "model"),
            "engine": GPU_ENGINE,
            "sampling": {"temperature": 1.0, "ignore_eos": True, "max_tokens": NUM_TOKENS},
        }
        return write_into(tmp_path, rows, **{**base, **sections})

    return write


@pytest.fixture
def start_dpgen(launcher: Launcher) -> Callable[..., Any]:
    """Return a function that starts `dpgen run` on some GPUs: `start(gpus, *arguments, ranks=1)`."""

    def start(gpus: list[str], *arguments: str, **options: Any) -> Any:
        return launcher.dpgen("run", *arguments, CUDA_VISIBLE_DEVICES=",".join(gpus), **options)

    return start
