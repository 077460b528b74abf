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
