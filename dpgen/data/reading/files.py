"""Find the files that `data.path` names, and what kind of files they are."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dpgen.config.sections import DataConfig
from dpgen.data.openai_batch.lines import FORMAT as BATCH_FORMAT
from dpgen.errors import ConfigError
from dpgen.formatting import format_count

_KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
_COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz", ".lz4"}
_COMPRESSED_KINDS = {"json", "csv", "tsv", "text"}
# Files of a folder that are about the data; `datasets` ignores them, too.
_DESCRIPTIONS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_MAX_LISTED = 5


def find_all_files(path: str | Sequence[str]) -> list[str]:
    """Return the files that `data.path` names; none if it is a directory or may be a Hub name.

    Raises:
        ConfigError: as `find_files`, or a list holds something else than files, or nothing.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise ConfigError("data.path=[] names no file")
    found = {part: find_files(part) for part in paths}
    others = [part for part, files in found.items() if not files]
    if others and len(paths) > 1:
        raise ConfigError(f"data.path may list files, not directories or Hub names: {list_names(others)}")
    return [file for part in paths for file in found[part]]


def find_files(path: str) -> list[str]:
    """Return the files that a path or glob names; none if it is a directory or may be a Hub name.

    A folder that a link leads back to counts once, as where a folder is read.

    Raises:
        ConfigError: nothing has that name, or the glob matches something that is no file.
    """
    path = re.sub(r"^(file|local)://", "", path)
    expanded = str(Path(path).expanduser())
    if os.path.isfile(expanded):
        return [expanded]
    if os.path.isdir(expanded):
        return []
    if glob.has_magic(path):
        matches = _drop_repeated_folders(_match(expanded))
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            folder, name = os.path.split(expanded)
            own = os.path.join(glob.escape(folder), name)
            hint = (
                f"; in the folder of that very name: data.path={own}"
                if own != expanded and os.path.isdir(folder)
                else ""
            )
            raise ConfigError(f"data.path: no file matches {path}{hint}")
        # With ** a folder is on the way to its files; without it, the files in a folder are not read.
        others = [match for match in matches if not os.path.isfile(match)]
        if "**" in path:
            others = [match for match in others if not os.path.isdir(match)]
        if others:
            raise ConfigError(
                f"data.path={path} matches {list_names(others)}, which can't be read as files (folders or broken "
                "links). Use a narrower pattern, or ** to read the files of folders, too"
            )
        return files
    if looks_local(path):
        hint = ". Braces are no pattern: write a list of paths" if re.search(r"\{.*,.*\}", path) else ""
        raise ConfigError(f"data.path: no such file or directory: {path}{hint}")
    return []


def find_input_kind(files: Iterable[str], data_format: str) -> str:
    """Return what kind of files these are, given `data.format`.

    Raises:
        ConfigError: as `find_kind`, or the format is openai_batch and these are no files of lines.
    """
    kind = find_kind(files)
    if data_format != BATCH_FORMAT:
        return kind
    if kind not in ("json", "text"):
        raise ConfigError(f"data.format={BATCH_FORMAT} is for files of JSON lines; data.path names {kind} files")
    return BATCH_FORMAT


def find_kind(files: Iterable[str]) -> str:
    """Return what kind of files these are by their names, all of one kind.

    Raises:
        ConfigError: they are of several kinds, or of an unknown one.
    """
    kinds: dict[str, str] = {}
    for file in files:
        suffix = _get_data_suffix(file)
        if suffix not in _KINDS:
            raise ConfigError(f"data.path: {file} is none of the known kinds: {', '.join(_KINDS)}")
        kind = _KINDS[suffix]
        if not file.lower().endswith(suffix) and kind not in _COMPRESSED_KINDS:
            raise ConfigError(f"data.path: {file} is a compressed {suffix} file: decompress it")
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        examples = ", ".join(kinds[kind] for kind in sorted(kinds))
        raise ConfigError(f"data.path names files of several kinds: {', '.join(sorted(kinds))} ({examples})")
    return next(iter(kinds))


def is_data_file(path: str) -> bool:
    """Return True if data may be read from a file of this name."""
    return _get_data_suffix(path) in _KINDS


def looks_local(path: str) -> bool:
    """Return True if a path can't be a Hub name (NAME or USER/NAME), by its form or by a data file's suffix."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _get_data_suffix(path) in _KINDS


def check_all_read(folder: str, read: Iterable[str]) -> None:
    """Check that each data file of a folder is among those that are read.

    Raises:
        ConfigError: files would be left out; names them.
    """
    known = {os.path.realpath(file) for file in read}
    left_out = [file for file in list_data_files(folder) if os.path.realpath(file) not in known]
    if left_out:
        names = [os.path.relpath(file, folder) for file in left_out]
        raise ConfigError(
            f"data.path={folder} would be read without {format_count(len(names), 'file')}: {list_names(names)}. A "
            "folder is read by the names of its splits (train, test, validation), and its files are of one kind. Name "
            f"the files that you want: data.path={os.path.join(folder, '*' + _get_data_suffix(left_out[0]))}, or a list"
        )


def explain_no_data(folder: str) -> str:
    """Return why `datasets` finds no data in a folder, and what to do."""
    files = list_data_files(folder)
    if not files:
        return f"the directory holds no file of a known kind ({', '.join(_KINDS)})"
    pattern = os.path.join(folder, "*" + os.path.splitext(files[0])[1])
    return f"{list_names(files)} would not be read by their names. Name the files: data.path={pattern}, or a list"


def check_names_read(files: Iterable[str]) -> None:
    """Check that the files of a folder that are read have a data file's name, and that all are of one kind.

    `datasets` also reads what has the suffix anywhere in its name, such as a backup: `a.jsonl.bak`.

    Raises:
        ConfigError: names the files that are none.
    """
    files = list(files)
    others = [file for file in files if _get_data_suffix(file) not in _KINDS]
    if others and len(others) < len(files):
        raise ConfigError(
            f"data.path would also read {list_names(others)}, which is no data file by its name. Move it elsewhere, or "
            "name the files that you want"
        )
    if not others:
        find_kind(files)


def list_data_files(folder: str) -> list[str]:
    """Return all files below a folder that data may be read from, but hidden ones."""
    return [file for file in _walk(folder) if _get_data_suffix(file) in _KINDS]


def list_other_files(folder: str, read: Iterable[str]) -> tuple[str, ...]:
    """Return the names of a folder's files that are neither read nor about the data, but hidden ones."""
    known = {os.path.realpath(file) for file in read}
    others = (file for file in _walk(folder) if os.path.realpath(file) not in known and not file.endswith(".md"))
    return tuple(os.path.relpath(file, folder) for file in others)


def _drop_repeated_folders(matches: Iterable[str]) -> list[str]:
    """Return the matches of a glob, sorted; those in one folder by one name of it, its own if that is among them."""
    names: dict[str, str] = {}  # folder → the name that stays
    for folder in sorted({os.path.dirname(match) for match in matches}):
        own = os.path.realpath(folder)
        if own not in names or own == os.path.abspath(folder):
            names[own] = folder
    kept = set(names.values())
    return sorted({match for match in matches if os.path.dirname(match) in kept})


def _match(pattern: str) -> list[str]:
    """Return what matches a glob, as `glob` does, but without following links in circles where it holds **."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    index = parts.index("**")
    head, tail = os.sep.join([*parts[:index], ""]), os.sep.join(parts[index + 1 :] or ["*"])
    roots = glob.glob(head) if head else [os.curdir]
    folders = [folder for root in roots for folder, _ in _walk_folders(root, hidden=(".",))]
    matches = [match for folder in folders for match in _match(os.path.join(glob.escape(folder), tail))]
    return matches if head else [os.path.relpath(match) for match in matches]


def _walk(folder: str) -> Iterator[str]:
    for directory, names in _walk_folders(folder, hidden=(".", "__")):
        for name in sorted(names):
            if not name.startswith(".") and name not in _DESCRIPTIONS:
                yield os.path.join(directory, name)


def _walk_folders(folder: str, hidden: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it, each once, with its files' names; left out if a name begins with `hidden`."""
    walked = set()  # a link may lead back
    for directory, subdirectories, names in os.walk(folder, followlinks=True):
        if (identity := os.path.realpath(directory)) in walked:
            subdirectories.clear()
            continue
        walked.add(identity)
        # A folder is walked by its own name where a link beside it leads there, too.
        visible = sorted(name for name in subdirectories if not name.startswith(hidden))
        subdirectories[:] = sorted(visible, key=lambda name: os.path.islink(os.path.join(directory, name)))
        yield directory, names


def reject_hub_keys(config: DataConfig, *names: str) -> None:
    """Reject keys that have no meaning for an input on disk, rather than ignore what they ask for.

    Raises:
        ConfigError: the configuration sets one of them.
    """
    mistakes = [
        f"data.{name}={value} is for a dataset of the Hub; data.path={config.path} is read from disk"
        for name in names
        if (value := getattr(config, name)) is not None
    ]
    if mistakes:
        raise ConfigError(*mistakes)


def reject_requests(config: DataConfig) -> None:
    """Reject `data.format=openai_batch` for an input that is no file.

    Raises:
        ConfigError: the configuration asks for it.
    """
    if config.format == BATCH_FORMAT:
        raise ConfigError(
            f"data.format={BATCH_FORMAT} is for files of JSON lines; data.path={config.path} is no file, nor a folder "
            "of files"
        )


def check_run_dir_apart(path: object, run_dir: Path) -> None:
    """Check that the run's own files can't become its input.

    Raises:
        ConfigError: the run directory is in a folder that is read, or its files match a glob that is.
    """
    for part in [path] if isinstance(path, str) else path if isinstance(path, list) else ():
        expanded = str(Path(str(part)).expanduser())
        root = expanded
        if not os.path.isdir(expanded):
            if "**" not in expanded:
                continue
            root = expanded[: expanded.index("**")] or "."
            root = root if os.path.isdir(root) else os.path.dirname(root) or "."
        elif {"state.json", "dataset_dict.json"} & set(os.listdir(expanded)):
            continue  # save_to_disk lists its files
        if run_dir.expanduser().resolve().is_relative_to(Path(root).resolve()):
            raise ConfigError(
                f"run.dir={run_dir} is inside data.path={part}, so that the run's own files would be read as data. "
                "Choose a run directory elsewhere"
            )


def list_names(names: list[str]) -> str:
    """Return names for a message, the first few of many."""
    more = f" and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def _get_data_suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in _COMPRESSIONS else suffix
