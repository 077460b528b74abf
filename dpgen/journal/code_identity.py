"""Tell which code of the user a run is made with: a function is known by its module's text, not by its name alone.

Nothing is imported: the user's modules belong into the processes that need them. What such a module imports in turn is
not looked at.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from dpgen.config.schema import Config
from dpgen.imports import list_import_folders


def identify_code(config: Config) -> tuple[dict[str, str], list[str]]:
    """Return a hash of the file of each module that a key names a function or class of, and the names without one.

    Returns:
        ``key=module:name`` → hash, and the names whose modules have no file that can be read. A module that there is
        not is in neither: the process that needs it says so.
    """
    hashes: dict[str, str] = {}
    unknown: list[str] = []
    for key, name in _iter_names(config):
        module = name.partition(":")[0]
        if _find_module(module) is None:
            continue
        path = find_module_file(module)
        try:
            content = None if path is None else path.read_bytes()
        except OSError:
            content = None
        if content is None:
            unknown.append(f"{key}={name}")
        else:
            hashes[f"{key}={name}"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return hashes, unknown


def _iter_names(config: Config) -> Iterator[tuple[str, str]]:
    """Yield keys and ``module:name``; an engine's classes only where it is vLLM's."""
    if config.check.function is not None:
        yield "check.function", config.check.function
    if config.program.function is not None:
        yield "program.function", config.program.function
    processors = config.engine.get("logits_processors") if config.run.engine == "vllm" else None
    for name in processors if isinstance(processors, (list, tuple)) else ():
        if isinstance(name, str) and ":" in name:
            yield "engine.logits_processors", name


def find_module_file(module: str) -> Path | None:
    """Return the file of a module, found as an import would find it; None for one without a file, or none at all."""
    spec = _find_module(module)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _find_module(module: str) -> ModuleSpec | None:
    """Return where an import would find a module; None if there is none."""
    places: list[str] | None = list_import_folders()
    spec: ModuleSpec | None = None
    for depth, name in enumerate(module.split(".")):
        if places is None:
            return None  # the module above is no package
        try:
            spec = PathFinder.find_spec(name, places)
            if spec is None and depth == 0:
                spec = importlib.util.find_spec(name)  # installed in place, by a finder of its own
        except (ImportError, ValueError, OSError):
            return None
        if spec is None:
            return None
        places = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return spec
