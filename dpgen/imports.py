"""Import packages of thousands of modules (torch, datasets) in two thirds of the time, and find those of the user."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpgen.errors import suggest_name


@contextmanager
def imports_without_gc() -> Iterator[None]:
    """Pause Python's garbage collector in this block, which is for imports alone.

    Imported objects stay until the process ends. The collector scans them again and again as their number grows,
    which takes a third of the time that torch and datasets need. So the block also freezes them: the collector never
    scans them later. With 32 ranks on a machine, imports are most of the time until the ranks generate.

    A block that imports nothing new freezes nothing: what an earlier job of this process has left must be collected.
    """
    if not gc.isenabled():
        yield
        return
    num_before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_before:
            gc.freeze()
        gc.enable()


def list_import_folders() -> list[str]:
    """Return where modules that the configuration names are looked for: the working directory, then as dpgen's own."""
    return list(dict.fromkeys([os.getcwd(), *filter(None, sys.path)]))


def look_in_import_folders() -> None:
    """Let this process, and those that it starts, look for modules in the folders of `list_import_folders`."""
    sys.path[:] = list_import_folders()


def load_function(key: str, name: str) -> Callable[..., Any]:
    """Return a function of the user.

    Args:
        key: that names it, for errors.
        name: ``package.module:name``.

    Raises:
        ValueError: it can't be imported, or is no function.
    """
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{key}={name}: {module_name} can't be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            names = [other for other in dir(found) if not other.startswith("_")]
            raise ValueError(f"{key}={name}: {module_name} has no {part!r}{suggest_name(part, names, 'its names')}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{key}={name}: is a {type(found).__name__}, and no function")
    function: Callable[..., Any] = found
    return function
