"""Tuning finds nearly the best of a sweep in a small part of the job's time, on engines as fast as measured ones.

benchmarks/tune.py has the engines; this is its table, with fewer seeds.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
from helpers.jobs import REPO


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tune", REPO / "benchmarks" / "tune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_engines_are_as_fast_as_those_that_were_measured(benchmark: Any) -> None:
    for name, point, measured, formula in benchmark.check_fit():
        assert abs(formula / measured - 1) < 0.03, (name, point)


@pytest.mark.parametrize(
    ("model", "workload"),
    [("1 billion", "chat-like"), ("8 billion", "chat-like"), ("1 billion", "prefill-heavy")],
)
def test_the_chosen_settings_are_nearly_the_best_and_found_in_time(benchmark: Any, model: str, workload: str) -> None:
    found = benchmark.tune(model, workload, 100_000)
    assert found["chosen_over_best"] >= 0.97
    assert found["wall_fraction"] < 0.05
    assert found["added_fraction"] < 0.04, "rows of the trials are done, so tuning costs less than it takes"


@pytest.mark.parametrize(("workload", "start_s"), [("prefill-heavy", 23.0), ("chat-like", 23.0)])
def test_slow_starts_leave_room_for_fewer_of_them_or_the_job_is_said_to_be_too_short(
    benchmark: Any, workload: str, start_s: float
) -> None:
    found = benchmark.tune("1 billion", workload, 100_000, start_s=start_s)
    is_too_short = 0.046 * found["job_s"] < start_s
    assert found["reason"].startswith("the job is too short to tune within 5 %") == is_too_short
    assert found["wall_fraction"] < 0.05 or is_too_short
    assert found["chosen_over_best"] >= 0.97
