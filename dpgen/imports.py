"""Import packages of thousands of modules (torch, datasets) in two thirds of the time, and find those of the user."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_without_gc() -> Iterator[None]:
    """Pause Python's garbage collector in this block, which is for imports alone.

    Imported objects stay until the process ends. The collector scans them again and again as their number grows,
    which takes a third of the time that torch and datasets need. So the block also freezes them: the collector never
    scans them later. With 32 ranks on a machine, imports are most of the time until the ranks generate.
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


def list_import_folders() -> list[str]:
    """Return where modules that the configuration names are looked for: the working directory, then as dpgen's own."""
    return list(dict.fromkeys([os.getcwd(), *filter(None, sys.path)]))
