"""Imports stay cheap: the function that needs a heavy package imports it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.jobs import REPO

HEAVY = {"torch", "vllm", "datasets", "transformers"}
LIGHT_MODULES = {
    "dpgen": HEAVY | {"numpy", "pyarrow", "omegaconf", "yaml"},
    # `dpgen --help` must answer within 0.1 s.
    "dpgen.cli": HEAVY | {"numpy", "pyarrow", "omegaconf"},
    "dpgen.config.schema": HEAVY,
    "dpgen.config.loader": HEAVY,
    "dpgen.records": HEAVY,
    "dpgen.scheduling.claims": HEAVY,
    "dpgen.run": {"torch", "vllm"},  # a rank process never imports CUDA, and one rank alone needs no torch
}


def find_packages_loaded_by(module: str) -> set[str]:
    """Import a module in a fresh process, and return the top-level packages that it has loaded then."""
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_a_module_loads_no_heavy_package(module: str) -> None:
    heavy = find_packages_loaded_by(module) & LIGHT_MODULES[module]
    assert not heavy, f"`import {module}` loads {sorted(heavy)}: import these in the function that needs them"


def test_the_check_sees_packages_that_an_import_loads() -> None:
    assert {"dpgen", "numpy"} <= find_packages_loaded_by("dpgen.scheduling.progress.throughput, numpy.linalg")
