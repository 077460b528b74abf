"""The garbage collector during imports."""

from __future__ import annotations

import gc

import pytest

from dpgen.imports import imports_without_gc


def test_the_collector_rests_during_imports_only() -> None:
    with imports_without_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), imports_without_gc():
        raise ImportError
    assert gc.isenabled(), "after a failed import, too"


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with imports_without_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
