"""The garbage collector during imports."""

from __future__ import annotations

import gc
import weakref

import pytest

from dpgen.imports import imports_without_gc


def test_the_garbage_collector_is_paused_during_imports_only() -> None:
    with imports_without_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), imports_without_gc():
        raise ImportError
    assert gc.isenabled(), "a failed import must not leave the collector paused"


def test_what_an_earlier_job_has_left_is_collected_though_a_later_one_imports_the_same_again() -> None:
    class Left:
        pass

    left = Left()
    left.cycle = left  # type: ignore[attr-defined]
    is_alive = weakref.ref(left)
    del left
    with imports_without_gc():
        import json  # noqa: F401 - imported long ago
    gc.collect()
    assert is_alive() is None


def test_a_disabled_garbage_collector_stays_disabled() -> None:
    gc.disable()
    try:
        with imports_without_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
