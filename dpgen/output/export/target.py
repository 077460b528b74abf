"""Publish an export whole or not at all, and never in place of what no export wrote.

- Rows are written in a hidden folder beside the target, synced, then renamed.
- A target that is there is refused unless it may be overwritten. A folder is then replaced only if all its files have
  the names that an export gives them.
"""

from __future__ import annotations

import fnmatch
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.files import FileSystem, publish_directory

_MAX_LISTED = 3


def resolve_target(path: str) -> Path:
    """Return where an export is written: the path without ``~`` and symbolic links."""
    return Path(path).expanduser().resolve()


def check_target(target: Path, run_dir: Path, *, overwrite: bool, folder_files: Sequence[str] | None) -> None:
    """Check a target before anything is read.

    Args:
        run_dir: the run that is exported.
        folder_files: patterns of the files of an export that is a folder; None for one that is a file.

    Raises:
        ConfigError: it is there and may not be overwritten, or holds what no export wrote.
    """
    run_dir = run_dir.resolve()
    if target == run_dir or run_dir in target.parents:
        raise ConfigError(f"TARGET={target} is in the run directory, whose files dpgen checks: choose another place")
    if target in run_dir.parents:
        raise ConfigError(f"TARGET={target} holds the run directory: choose another place")
    if not target.exists():
        return
    if not overwrite:
        raise ConfigError(f"TARGET={target} is there already: choose another name, or replace it with --overwrite")
    if target.is_dir() != (folder_files is not None):
        is_now, would_be = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise ConfigError(f"TARGET={target} is a {is_now}, and this export is a {would_be}: choose another name")
    if folder_files is not None:
        others = sorted(
            path.name
            for path in target.iterdir()
            if not path.is_file() or not any(fnmatch.fnmatch(path.name, pattern) for pattern in folder_files)
        )
        if others:
            shown = ", ".join(others[:_MAX_LISTED]) + (", ..." if len(others) > _MAX_LISTED else "")
            raise ConfigError(f"TARGET={target} holds what no such export wrote ({shown}): choose another name")


@contextmanager
def open_target(target: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield the place to write, and publish it under the target's name at the end; remove it after an error.

    Raises:
        DpgenError: it can't be written.
    """
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        (work / target.name if is_folder else work).mkdir(parents=True)
        yield work / target.name
        if is_folder:
            publish_directory(work / target.name, target)
        else:
            files = FileSystem()
            files.sync_path(work / target.name)
            files.replace(work / target.name, target)
            files.sync_directory(target.parent)
    except OSError as error:
        raise DpgenError(f"{target} can't be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
