"""Fill the files of a dataset one after the other: ``train-00000-of-00003.parquet``, ..."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpgen.formatting import format_count

# What helps where files of a dataset are missing, too many, or damaged.
REWRITE_HINT = "remove dataset/, and the run's own command writes it again from the journal"


class FileSet:
    """Open one file after the other, each for the same number of rows, and name them at the end.

    Args:
        suffix: of the files' names, without the dot.
        open_file: opens a file of a path to write; `close` closes it.
        rows_per_file: the maximum number of rows in one file.
    """

    def __init__(self, directory: Path, suffix: str, open_file: Callable[[Path], Any], rows_per_file: int) -> None:
        self._directory, self._suffix, self._open_file = directory, suffix, open_file
        self._rows_per_file = rows_per_file
        self._paths: list[Path] = []
        self._num_free_rows = 0  # that the open file still takes
        self._file: Any = None

    def __enter__(self) -> FileSet:
        self._open_next()  # even if no row follows: an empty result is one file without rows
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        number_files(self._paths)

    def allot(self, num_rows: int) -> Iterator[tuple[Any, int, int]]:
        """Yield (file, start, count) for the next rows: which of them belong into which file, in order."""
        start = 0
        while start < num_rows:
            if not self._num_free_rows:
                self._file.close()
                self._open_next()
            count = min(self._num_free_rows, num_rows - start)
            yield self._file, start, count
            self._num_free_rows -= count
            start += count

    def _open_next(self) -> None:
        self._num_free_rows = self._rows_per_file
        path = self._directory / f"part-{len(self._paths):05d}.{self._suffix}"
        self._paths.append(path)
        self._file = self._open_file(path)


def number_files(paths: Sequence[Path]) -> None:
    """Rename the files of a dataset, in order, once their number is known: ``train-00000-of-00003.parquet``, ..."""
    for number, path in enumerate(paths):
        path.rename(path.with_name(f"train-{number:05d}-of-{len(paths):05d}{path.suffix}"))


def list_files(directory: Path, suffix: str) -> tuple[list[Path], str | None]:
    """Return a dataset's files in order, and what is wrong if some of them are missing; None if nothing is.

    Args:
        suffix: of the files' names, without the dot.
    """
    files, expected = _find_files(directory, suffix)
    if len(files) == expected:
        return files, None
    return files, f"dataset/ holds {format_count(len(files), 'file')} of {expected or 'an unknown number'}"


def find_lost_files(directory: Path, suffix: str) -> str | None:
    """Return which of a dataset's files were removed; None if none was, whatever else is there."""
    files, expected = _find_files(directory, suffix)
    if not files:
        return "dataset/ is empty" if directory.is_dir() else "dataset/ is missing"
    return None if expected is None or len(files) >= expected else list_files(directory, suffix)[1]


def _find_files(directory: Path, suffix: str) -> tuple[list[Path], int | None]:
    files = sorted(directory.glob(f"train-*.{suffix}")) if directory.is_dir() else []
    name = re.fullmatch(r"train-\d+-of-(\d+)", files[0].stem) if files else None
    return files, int(name[1]) if name else None
