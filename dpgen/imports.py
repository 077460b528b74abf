"""Importing what consists of thousands of modules (torch, datasets) in two thirds of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_without_gc() -> Iterator[None]:
    """Python's garbage collector rests within this block, which is for imports alone.

    What they make stays until the process ends, and looking through it again and again, as it grows, takes a third of
    the time that torch and datasets need. So it is kept from the collector's sight for good. With 32 ranks on a
    machine that is most of the time until they generate.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
