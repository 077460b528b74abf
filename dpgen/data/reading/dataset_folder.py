"""Read what a folder's card and the builders of `datasets` say about its files, for `dpgen.data.input_loading`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpgen.data.reading.files import find_kind, list_data_files
from dpgen.errors import ConfigError

# Options of `datasets`' builders, as a dataset's card may set them.
_OPTIONS = frozenset(["features", "sep", "delimiter", "header", "names", "field", "encoding", "columns", "filters"])
_OPTIONS |= {"sample_by", "keep_linebreaks", "quotechar", "skiprows", "column_names"}


def check_folder_name(path: str) -> None:
    """Check that `datasets` would look for the files of this folder only: it takes its whole path for a pattern.

    Raises:
        ConfigError: it would find those of another folder, or none.
    """
    own = str(Path(path).resolve())
    if "::" not in own and (not glob.has_magic(own) or glob.glob(own) == [own]):
        return
    suffixes = [os.path.splitext(file)[1] for file in list_data_files(path)]
    files = os.path.join(glob.escape(path), "**", f"*{suffixes[0]}") if suffixes else ""
    raise ConfigError(
        f"data.path={path}: `datasets` takes a folder's path for a pattern, and finds other files, or none, where it "
        f"holds *, ?, [...] or ::. Rename the folder{f', or name its files: data.path={files}' if files else ''}"
    )


def explain_card(path: str, read: Callable[[Path], object]) -> str | None:
    """Return why `read` can't read a folder's card, which may say which files are data; None if it can.

    Also None if there is no card.
    """
    import yaml

    card = Path(path) / "README.md"
    if not card.is_file():
        return None
    try:
        read(card)
    except Exception as error:  # noqa: BLE001 - it holds whatever a user wrote
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"line {error.problem_mark.line + 2}: {error.problem}"  # below the line of ---
        elif isinstance(error, UnicodeDecodeError):
            reason = f"it is no UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})"
        return (
            f"{card}, in which `datasets` looks for the names of the data files: {reason.rstrip('.')}. Mend or move it"
        )
    return None


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
