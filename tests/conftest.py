"""Order of the tests, slots for real engines, and the fixtures that all tests share."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Launcher, write_into
from helpers.kept_engine import KeptEngine
from helpers.locks import try_lock

_NUM_ENGINE_SLOTS = 2


class GroupTestsThatImportVllm:
    """Put tests that import vLLM into pytest's own process into the group `engines`: it takes 8 seconds a worker."""

    @pytest.hookimpl(tryfirst=True)  # before pytest-xdist's, which reads the marks
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if has_mark(item, "vllm") and not any(has_mark(item, mark) for mark in ("multi", "slow", "xdist_group")):
                item.add_marker(pytest.mark.xdist_group("engines"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GroupTestsThatImportVllm())
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell ignores Ctrl-C for what it starts in the background, and so would all that the tests start.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # after pytest-xdist's, which writes groups into the tests' names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests, longest first, so that no worker is still in a long test when the others are finished.

    - SLURM's tests run first of all: they run one after the other and mostly wait, so other tests get the cores.
    - Of the others, tests with and without a real engine alternate, since few engines run at a time.
    - Tests with real engines that share an engine or a fixture are one group, `engines`: its worker and that of SLURM's
      tests have the slots, while the others run tests without real engines and wait for none.
    """
    slurm = sorted((item for item in items if has_mark(item, "slurm")), key=lambda item: not has_mark(item, "vllm"))
    others = [item for item in items if not has_mark(item, "slurm")]
    slow = [item for item in others if has_mark(item, "slow")]
    quick = [item for item in others if not has_mark(item, "slow")]
    items[:] = [*slurm, *_alternate_engines(slow), *_alternate_engines(quick)]
    for item in items:
        if has_mark(item, "xdist_group") and item.config.getoption("loadgroup", False) and "@" not in item.nodeid:
            raise pytest.UsageError("pytest-xdist ignores the mark xdist_group: install the pytest of setup.cfg")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let at most two tests have real engines at a time: three engines thrash two cores.

    Outermost of all wrappers, so that waiting for a slot takes nothing off a test's time limit.
    """
    if not has_mark(item, "vllm"):
        return (yield)
    with reserve_engine_slot() as slot:
        Launcher.engine_slot = slot
        try:
            return (yield)
        finally:
            Launcher.engine_slot = None


def has_mark(item: pytest.Item, mark: str) -> bool:
    return item.get_closest_marker(mark) is not None


@contextlib.contextmanager
def reserve_engine_slot() -> Iterator[int]:
    """Wait for a slot (0 or 1), and hold it against all tests that run at the same time."""
    name = f"dpgen-tests-{os.getuid()}-{os.environ.get('PYTEST_XDIST_TESTRUNUID', 'alone')}"
    with contextlib.ExitStack() as stack:
        paths = [Path(tempfile.gettempdir()) / f"{name}-{slot}" for slot in range(_NUM_ENGINE_SLOTS)]
        files = [stack.enter_context(path.open("w")) for path in paths]
        while (locked := next(filter(try_lock, files), None)) is None:
            time.sleep(0.2)
        yield files.index(locked)


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Leave the logger `dpgen` as it was: a command that ran in the test's process has set it up."""
    dpgen = logging.getLogger("dpgen")
    handlers, level, propagate = list(dpgen.handlers), dpgen.level, dpgen.propagate
    yield
    for handler in set(dpgen.handlers) - set(handlers):
        handler.close()
    dpgen.handlers[:], dpgen.propagate = handlers, propagate
    dpgen.setLevel(level)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """Start jobs, and end those that still run after the test."""
    launcher = Launcher(tmp_path)
    yield launcher
    for job in launcher.jobs:
        job.end()


@pytest.fixture(scope="session")
def kept_engine() -> Iterator[KeptEngine]:
    """Run jobs on real vLLM that share an engine; their tests belong to the group `engines`, to share one process."""
    engine = KeptEngine()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with the tokenizer `plain`; tests of several modules run on one engine with it."""
    from helpers.tiny_model import save_tiny_model  # imports transformers, which most tests do without

    return save_tiny_model(tmp_path_factory.mktemp("plain"), "plain")


@pytest.fixture(scope="session")
def bos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model whose tokenizer puts a token before each text, as `plain_model`."""
    from helpers.tiny_model import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("bos"))


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., str]:
    """Write a configuration for the fake engine over `rows`, changed by section, and return its path."""

    def write(rows: Sequence[Mapping[str, Any]], name: str = "conf.yaml", **sections: Any) -> str:
        return write_into(tmp_path, rows, name, **sections)

    return write


def _alternate_engines(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests in turn from those with a real engine and those without."""
    real = [item for item in items if has_mark(item, "vllm")]
    real.sort(key=lambda item: not has_mark(item, "xdist_group"))  # one worker runs a whole group, which takes long
    light = [item for item in items if not has_mark(item, "vllm")]
    light.sort(key=lambda item: not has_mark(item, "multi"))
    return [item for pair in zip_longest(real, light) for item in pair if item is not None]
