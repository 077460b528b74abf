"""Read what a folder's card and the builders of `datasets` say about its files, for `dpgen.data.input_loading`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpgen.data.reading.files import find_kind
from dpgen.errors import ConfigError

# Options of `datasets`' builders, as a dataset's card may set them.
_OPTIONS = frozenset(["features", "sep", "delimiter", "header", "names", "field", "encoding", "columns", "filters"])
_OPTIONS |= {"sample_by", "keep_linebreaks", "quotechar", "skiprows", "column_names"}


def has_configurations(path: str) -> bool:
    """Return True if a folder's card says which files are data."""
    card = Path(path) / "README.md"
    return card.is_file() and re.search(r"^configs:", card.read_text(errors="replace"), re.MULTILINE) is not None


def is_read_alike(builder: Any) -> bool:
    """Return True if the files of a builder can be read without it: of a known kind, and without options."""
    options = {key.name: key.default for key in fields(builder.config) if key.name in _OPTIONS}
    changed = [name for name, default in options.items() if getattr(builder.config, name) != default]
    if changed and not (changed == ["sep"] and builder.config.sep == "\t"):
        return False
    try:
        find_kind([str(file) for files in (builder.config.data_files or {}).values() for file in files])
    except ConfigError:
        return False
    return bool(builder.config.data_files)


def is_media_folder(builder: Any) -> bool:
    """Return True if the rows are a folder's images, audio or videos, with what a metadata file says of them."""
    return any(kind.__name__ == "FolderBasedBuilder" for kind in type(builder).__mro__)


def load_files_with_rows(files: Sequence[str], load: Callable[[list[str]], Any]) -> Any:
    """Return what `load` returns for files, which fails where one of them has no rows; None if none has rows."""

    def has_rows(file: str) -> bool:
        try:
            return len(load([file])) > 0
        except Exception as error:
            if _is_empty_input_error(error):
                return False
            raise

    files = [file for file in files if os.path.getsize(file) > 0]
    try:
        return load(files) if files else None
    except Exception as error:
        if len(files) == 1 and not _is_empty_input_error(error):
            raise
        with_rows = [file for file in files if has_rows(file)]
        if with_rows == files:
            raise
        return load(with_rows) if with_rows else None


def _is_empty_input_error(error: Exception) -> bool:
    """Return True if `datasets` failed because the files are empty, which is no mistake."""
    names = {type(exception).__name__ for exception in (error, error.__cause__) if exception is not None}
    if names & {"StopIteration", "EmptyDataError", "SchemaInferenceError"}:
        return True
    return "corresponds to no data" in str(error)
