"""The garbage collector during imports."""

from __future__ import annotations

import gc

import pytest

from dpgen.imports import quick_imports


def test_the_collector_rests_during_imports_only() -> None:
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled(), "after a failed import, too"


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
