"""The input rows: opened with Hugging Face `datasets`, known by their index, dealt in shards. Home of `datasets`."""

from __future__ import annotations

import glob
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.config.schema import DataConfig, parse_range
from dpgen.errors import ConfigError
from dpgen.imports import imports_without_gc

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",  # with another separator
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz", ".lz4"}
_READ_ROWS = 1_000  # rows read at a time
_HASH_ROWS = 10_000  # rows hashed at a time; part of the fingerprint's definition


class InputRows:
    """The rows of a run, after `data.select` and `data.limit`; a row is known by its index here."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names)

    @property
    def is_empty(self) -> bool:
        """No rows at all; then the columns may be unknown, too."""
        return len(self.dataset) == 0

    def shard(self, order: np.ndarray, num_shards: int, index: int, columns: Sequence[str] | None = None) -> Shard:
        """Shard `index` of `num_shards` of the rows listed in `order`.

        Args:
            order: row indices, int64, in the order of work: what is still to do.
            columns: the only ones to read, where given.

        Strided, not contiguous: neighbours in a file tend to be alike, and a shard of long rows would keep one
        rank busy after the others are through.
        """
        dataset = self.dataset if columns is None else self.dataset.select_columns(list(columns))
        if len(order) != len(dataset) or (np.diff(order) != 1).any():
            dataset = dataset.select(order)
        dataset = dataset.shard(num_shards=num_shards, index=index, contiguous=False)
        return Shard(dataset, order[index::num_shards])

    def shard_in_chunks(self, row_ids: np.ndarray, starts: np.ndarray, columns: Sequence[str]) -> Shard:
        """A shard of rows that are claimed in pieces of several; see `Shard`."""
        return Shard(self.dataset.select_columns(list(columns)).select(row_ids), row_ids, starts)

    def iter_rows(self, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Some columns of some rows, one after the other."""
        some = self.dataset.select_columns(list(columns)).select(row_ids)
        for batch in some.iter(_READ_ROWS):
            for values in zip(*(batch[name] for name in columns), strict=True):
                yield dict(zip(columns, values, strict=True))

    def read_numbers(self, column: str, row_ids: np.ndarray) -> np.ndarray:
        """One column of some rows as float64; NaN where it is null or no number."""
        some = self.dataset.select_columns([column]).select(row_ids)
        found = [np.array([_to_float(value) for value in batch[column]]) for batch in some.iter(_READ_ROWS)]
        return np.concatenate([np.zeros(0), *found])

    def fingerprint(self) -> dict[str, Any]:
        """What the input is, for comparing runs: number of rows, columns, and a hash of all contents (blake2b)."""
        digest = hashlib.blake2b(digest_size=16)
        for table in self.iter_tables(_HASH_ROWS):
            digest.update(_canonical_bytes(table))
        return {"num_rows": len(self), "columns": self.columns, "content": digest.hexdigest()}

    def iter_tables(self, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows in input order, as Arrow tables of `num_rows` rows (the last may be shorter)."""
        dataset = self.dataset if columns is None else self.dataset.select_columns(list(columns))
        view = dataset.with_format("arrow")
        for start in range(0, len(view), num_rows):
            yield view[start : start + num_rows]

    def write_card(self, folder: Path, schema: pa.Schema) -> None:
        """Writes the dataset card that tells `datasets` the columns' types, which JSON lines don't."""
        import datasets

        info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))
        card = datasets.info.DatasetInfosDict({"default": info})
        card.write_to_directory(str(folder))

    def build_output_schema(self, added: pa.Schema, columns: Sequence[str] | None = None) -> pa.Schema:
        """The Arrow schema of (some of) the input's columns and `added` ones, with the features `datasets` restores."""
        import datasets

        kept = self.columns if columns is None else columns
        features = datasets.Features(
            {name: self.dataset.features[name] for name in kept if name in self.dataset.features}
        )
        features.update(datasets.Features.from_arrow_schema(added))
        return features.arrow_schema


@dataclass(frozen=True)
class Shard:
    """Some rows in work order, with their indices in the input.

    Attributes:
        starts: where the pieces begin that rows are claimed in, and at last the number of rows; None where each row
            is claimed by itself.
    """

    dataset: datasets.Dataset
    row_ids: np.ndarray
    chunk_starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    def read_positions(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows at positions start..stop of this shard, as (row index, column → value)."""
        if self.chunk_starts is not None:
            start, stop = int(self.chunk_starts[start]), int(self.chunk_starts[stop])
        batch = self.dataset[start:stop]
        for offset, row_id in enumerate(self.row_ids[start:stop]):
            yield int(row_id), {name: values[offset] for name, values in batch.items()}


def load_input(config: DataConfig) -> InputRows:
    """Loads what `data.*` names, building the `datasets` cache where it isn't there.

    Raises:
        ConfigError: nothing is there, it can't be read, the split doesn't exist.
    """
    with imports_without_gc():
        import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        dataset = _load(config)
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:  # noqa: BLE001 - `datasets` raises whatever its readers raise; all of it is about the input
        raise ConfigError(f"data.path={config.path}: {_find_root_cause(error)}") from None
    dataset = dataset.with_format(None)  # plain Python values, whatever format it was saved with
    if config.select is not None:
        dataset = dataset.select(range(*parse_range(config.select).indices(len(dataset))))
    if config.limit is not None:
        dataset = dataset.select(range(min(config.limit, len(dataset))))
    return InputRows(dataset)


def _load(config: DataConfig) -> datasets.Dataset:
    import datasets

    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    files = [found for path in paths for found in _files(path)]
    if files:
        _reject_hub_keys(config, "name", "revision")
        builders = {_builder(file) for file in files}
        if len({_get_data_suffix(file) == ".tsv" for file in files}) > 1:
            raise ConfigError("data.path names files separated by tabs and others; convert one kind")
        if len(builders) > 1:
            raise ConfigError(f"data.path names files of several kinds: {', '.join(sorted(builders))}")
        return _load_files(builders.pop(), files, config.split or "train")
    if len(paths) > 1:
        raise ConfigError("data.path may list files, not folders or Hub names")
    path = str(Path(paths[0]).expanduser()) if _looks_local(paths[0]) else paths[0]
    saved = {"state.json", "dataset_dict.json"}
    if os.path.isdir(path):
        _reject_hub_keys(config, "revision")
    if os.path.isdir(path) and saved & set(os.listdir(path)):
        _reject_hub_keys(config, "name")
        try:
            return _select_split(datasets.load_from_disk(path), config.split)
        except IndexError:  # what `datasets` raises where a saved dataset has no rows
            return datasets.Dataset.from_dict({})
    found = datasets.load_dataset(path, config.name, split=config.split, revision=config.revision)
    return _select_split(found, config.split)


def _reject_hub_keys(config: DataConfig, *names: str) -> None:
    """Refuses keys that this input has no use for, rather than read something else than what they ask for."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"data.{name}={value} is for a dataset of the Hub; data.path={config.path} is read from disk"
            )


def _load_files(builder: str, files: list[str], split: str) -> datasets.Dataset:
    """The rows of files of one kind; empty files among them are no fault, and no rows at all are an empty input."""
    import datasets

    extra = {"sep": "\t"} if _get_data_suffix(files[0]) == ".tsv" else {}

    def load(some: list[str]) -> datasets.Dataset:
        # Escaped, since `datasets` takes names for patterns.
        data_files = [glob.escape(each) for each in some]
        return datasets.load_dataset(builder, data_files=data_files, split=split, **extra)

    def has_rows(file: str) -> bool:
        try:
            return len(load([file])) > 0
        except Exception as error:
            if _is_empty_input_error(error):
                return False
            raise

    files = [each for each in files if os.path.getsize(each) > 0]
    try:
        return load(files) if files else datasets.Dataset.from_dict({})
    except Exception as error:
        if len(files) == 1 and not _is_empty_input_error(error):
            raise
        full = [each for each in files if has_rows(each)]
        if full == files:
            raise
        return load(full) if full else datasets.Dataset.from_dict({})


def _files(path: str) -> list[str]:
    """The files a path stands for; none if it is a folder or (perhaps) a Hub name."""
    expanded = str(Path(path).expanduser())
    if os.path.isfile(expanded):
        return [expanded]
    if os.path.isdir(expanded):
        return []
    if glob.has_magic(path):
        found = sorted(each for each in glob.glob(expanded, recursive=True) if os.path.isfile(each))
        if not found:
            raise ConfigError(f"data.path: no file matches {path}")
        return found
    if _looks_local(path):
        raise ConfigError(f"data.path: no such file or folder: {path}")
    return []


def _looks_local(path: str) -> bool:
    """Whether it can't be a Hub name (NAME or USER/NAME): a path by its form, or by a data file's ending."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _get_data_suffix(path) in _BUILDERS


def _get_data_suffix(path: str) -> str:
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in _COMPRESSIONS else ending


def _builder(file: str) -> str:
    ending = _get_data_suffix(file)
    if ending not in _BUILDERS:
        raise ConfigError(f"data.path: {file} is none of the known kinds: {', '.join(_BUILDERS)}")
    return _BUILDERS[ending]


def _select_split(found: Any, split: str | None) -> datasets.Dataset:
    import datasets

    if isinstance(found, datasets.Dataset):
        return found
    names = sorted(map(str, found))
    if split is None and len(names) > 1:
        raise ConfigError(f"data.split is needed: there are {', '.join(names)}")
    chosen = split or names[0]
    if chosen not in found:
        raise ConfigError(f"data.split={chosen}: there are only {', '.join(names)}")
    return found[chosen]


def _is_empty_input_error(error: Exception) -> bool:
    """Whether `datasets` failed because the files are empty, which is no fault: an empty run is a run."""
    seen = {type(each).__name__ for each in (error, error.__cause__) if each is not None}
    return bool(seen & {"StopIteration", "EmptyDataError", "SchemaInferenceError"}) or "corresponds to no data" in str(
        error
    )


def _find_root_cause(error: Exception) -> str:
    """What went wrong, from the cause that `datasets` wraps in "An error occurred while generating the dataset"."""
    root: BaseException = error.__cause__ or error
    lines = str(root).strip().splitlines()
    return lines[0] if lines else type(root).__name__


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _canonical_bytes(table: pa.Table) -> bytes:
    """A table's content as bytes that don't depend on how it was cut into chunks, nor on the rows around it."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    # Taken, not sliced: a slice's bitmaps end with bits of the rows that follow, beyond `data.limit`, say.
    bare = table.take(np.arange(table.num_rows)).combine_chunks().replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, bare.schema) as writer:
        writer.write_table(bare)
    return bytes(sink.getvalue())
