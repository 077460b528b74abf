"""Which tests run when, and the fixtures that all of them share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import pytest
from helpers.jobs import Launcher, write_into


def has(item: pytest.Item, mark: str) -> bool:
    return item.get_closest_marker(mark) is not None


@pytest.hookimpl(trylast=True)  # after pytest-xdist's, which marks groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker ends with them while the others are through.

    First of all SLURM's tests, which run one after the other and mostly wait: whatever runs beside them has the cores.
    Of the others one with a real engine and one without alternate, since only so many engines run at a time.
    """

    def alternating(some: list[pytest.Item]) -> list[pytest.Item]:
        real = [item for item in some if has(item, "vllm")]
        real.sort(key=lambda item: not has(item, "xdist_group"))  # a group is one worker's, and long
        light = sorted((item for item in some if not has(item, "vllm")), key=lambda item: not has(item, "multi"))
        return [item for pair in zip_longest(real, light) for item in pair if item is not None]

    slurm = sorted((item for item in items if has(item, "slurm")), key=lambda item: not has(item, "vllm"))
    others = [item for item in items if not has(item, "slurm")]
    slow, quick = [], []
    for item in others:
        (slow if has(item, "slow") else quick).append(item)
    items[:] = [*slurm, *alternating(slow), *alternating(quick)]
    for item in items:
        if has(item, "xdist_group") and item.config.getoption("loadgroup", False) and "@" not in item.nodeid:
            raise pytest.UsageError("pytest-xdist does not heed xdist_group any more; which pytest is this?")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Of several tests at a time, no more than two have real engines: three of those thrash two cores.

    Outside of all else, so that the wait for a place is no part of a test's time limit.
    """
    if not has(item, "vllm"):
        return (yield)
    with reserve_engine_slot() as place:
        Launcher.place = place
        try:
            return (yield)
        finally:
            Launcher.place = None


@contextlib.contextmanager
def reserve_engine_slot() -> Iterator[int]:
    """One of two, 0 or 1, that this test has for itself among all that run at the same time."""
    name = f"dpgen-tests-{os.getuid()}-{os.environ.get('PYTEST_XDIST_TESTRUNUID', 'alone')}"
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((Path(tempfile.gettempdir()) / f"{name}-{place}").open("w")) for place in (0, 1)]
        while (taken := next(filter(_locks, files), None)) is None:
            time.sleep(0.2)
        yield files.index(taken)


def _locks(file: IO[str]) -> bool:
    """Tries to lock the file; it stays so until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    started = Launcher(tmp_path)
    yield started
    for job in started.jobs:
        job.end()


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., str]:
    """Writes a configuration for the fake engine over `rows`, changed by section; gives its path."""

    def write(rows: Sequence[Mapping[str, Any]], name: str = "conf.yaml", **sections: Any) -> str:
        return write_into(tmp_path, rows, name, **sections)

    return write
