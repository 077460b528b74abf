"""Load the input rows with Hugging Face `datasets`, and read them by index, in shards. The only home of `datasets`.

- A row is known by its index after `data.select` and `data.limit`: `row_ids` are int64 indices of this kind.
- The rows never change, and neither does their order in the input; shards only select from them.
- Files without rows are no mistake: an empty input is a run with an empty result.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.config.checks import parse_range
from dpgen.config.schema import DataConfig
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
_READ_BATCH_ROWS = 1_000
_HASH_BATCH_ROWS = 10_000  # part of the fingerprint's definition


class InputRows:
    """Give access to the rows of a run, after `data.select` and `data.limit`, by their index."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self._on_batch: Callable[[], None] = lambda: None

    def with_progress(self, on_batch: Callable[[], None]) -> InputRows:
        """Return the same rows; `iter_rows` and `read_numbers` then call `on_batch` after every 1,000 rows read.

        Reading all prompts of a large input takes longer than a healthy rank may be silent.
        """
        rows = copy.copy(self)
        rows._on_batch = on_batch
        return rows

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names)

    @property
    def is_empty(self) -> bool:
        """Return True if there are no rows; then the columns may be unknown, too."""
        return len(self.dataset) == 0

    def shard(self, order: np.ndarray, num_shards: int, index: int, columns: Sequence[str] | None = None) -> Shard:
        """Return shard `index` of `num_shards` of the rows listed in `order`.

        Shards are strided, not contiguous: neighbours in a file tend to be similar, and a shard of long rows would keep
        one rank busy after the others are finished.

        Args:
            order: int64[num_rows], the indices of the remaining rows in work order.
            columns: the columns to read; None for all.
        """
        dataset = self.dataset if columns is None else self.dataset.select_columns(list(columns))
        row_ids = order[index::num_shards]  # before selecting: selecting all 10 M rows of a resumed run takes 2.5 s
        return Shard(dataset.select(row_ids), row_ids)

    def shard_in_chunks(self, row_ids: np.ndarray, starts: np.ndarray, columns: Sequence[str]) -> Shard:
        """Return a shard whose rows are claimed in chunks; see `Shard` for `row_ids` and `starts`."""
        return Shard(self.dataset.select_columns(list(columns)).select(row_ids), row_ids, starts)

    def iter_rows(self, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows `row_ids` one by one, with these columns only."""
        selected = self.dataset.select_columns(list(columns)).select(row_ids)
        for batch in self._iter_batches(selected):
            for values in zip(*(batch[name] for name in columns), strict=True):
                yield dict(zip(columns, values, strict=True))

    def read_numbers(self, column: str, row_ids: np.ndarray) -> np.ndarray:
        """Return one column of the rows `row_ids` as float64[len(row_ids)]; NaN where it is null or not a number."""
        selected = self.dataset.select_columns([column]).select(row_ids)
        chunks = [np.array([_to_float(value) for value in batch[column]]) for batch in self._iter_batches(selected)]
        return np.concatenate([np.zeros(0), *chunks])

    def _iter_batches(self, selected: datasets.Dataset) -> Iterator[dict[str, list[Any]]]:
        for batch in selected.iter(_READ_BATCH_ROWS):
            yield batch
            self._on_batch()

    def fingerprint(self, num_rows: int | None = None) -> dict[str, Any]:
        """Return what identifies the input: number of rows, columns, and a hash of all contents (blake2b).

        Args:
            num_rows: of the first rows only, as if `data.limit` had cut the input there; None for all.
        """
        num_rows = len(self) if num_rows is None else num_rows
        digest = hashlib.blake2b(digest_size=16)
        num_hashed = 0
        for table in self.iter_tables(_HASH_BATCH_ROWS):
            if num_hashed >= num_rows:
                break
            digest.update(_canonical_bytes(table.slice(0, num_rows - num_hashed)))
            num_hashed += table.num_rows
        return {"num_rows": num_rows, "columns": self.columns, "content": digest.hexdigest()}

    def iter_tables(self, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield all rows in input order, as Arrow tables of `num_rows` rows (the last may be shorter)."""
        dataset = self.dataset if columns is None else self.dataset.select_columns(list(columns))
        view = dataset.with_format("arrow")
        for start in range(0, len(view), num_rows):
            yield view[start : start + num_rows]

    def write_card(self, directory: Path, schema: pa.Schema) -> None:
        """Write the dataset card, from which `datasets` reads the columns' types; JSON lines don't hold them."""
        import datasets

        info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))
        card = datasets.info.DatasetInfosDict({"default": info})
        card.write_to_directory(str(directory))

    def build_output_schema(self, added: pa.Schema, columns: Sequence[str] | None = None) -> pa.Schema:
        """Return the Arrow schema of the input's columns and the `added` ones, with the features of `datasets`.

        Args:
            columns: the input columns to keep; None for all.
        """
        import datasets

        kept_columns = self.columns if columns is None else columns
        features = datasets.Features(
            {name: self.dataset.features[name] for name in kept_columns if name in self.dataset.features}
        )
        features.update(datasets.Features.from_arrow_schema(added))
        return features.arrow_schema


@dataclass(frozen=True)
class Shard:
    """Hold the rows of a shard in work order, with their indices in the input.

    Attributes:
        row_ids: int64[num_rows], the rows' indices in the input.
        chunk_starts: int64[num_chunks + 1], the position at which each chunk of rows starts, then the number of rows;
            None where each row is claimed alone.
    """

    dataset: datasets.Dataset
    row_ids: np.ndarray
    chunk_starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    def read_positions(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows of a claim, as (row index, column → value).

        Args:
            start: the first position in this shard: of a chunk where the shard has chunks, else of a row.
            stop: the position after the last one.
        """
        if self.chunk_starts is not None:
            start, stop = int(self.chunk_starts[start]), int(self.chunk_starts[stop])
        batch = self.dataset[start:stop]
        for offset, row_id in enumerate(self.row_ids[start:stop]):
            yield int(row_id), {name: values[offset] for name, values in batch.items()}


def load_input(config: DataConfig) -> InputRows:
    """Return the rows that `data.*` names, and build the `datasets` cache where it is missing.

    Raises:
        ConfigError: the input or its split doesn't exist, or can't be read.
    """
    with imports_without_gc():
        import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        dataset = _load_dataset(config)
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:  # noqa: BLE001 - `datasets` passes on all that its readers raise; all of it is about the input
        raise ConfigError(f"data.path={config.path}: {_find_root_cause(error)}") from None
    dataset = dataset.with_format(None)  # plain Python values, even if it was saved with another format
    if config.select is not None:
        dataset = dataset.select(range(*parse_range(config.select).indices(len(dataset))))
    if config.limit is not None:
        dataset = dataset.select(range(min(config.limit, len(dataset))))
    return InputRows(dataset)


def _load_dataset(config: DataConfig) -> datasets.Dataset:
    import datasets

    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    files = [file for path in paths for file in _find_files(path)]
    if files:
        _reject_hub_keys(config, "name", "revision")
        builders = {_get_builder(file) for file in files}
        if len({_get_data_suffix(file) == ".tsv" for file in files}) > 1:
            raise ConfigError("data.path names files separated by tabs and others; convert one kind")
        if len(builders) > 1:
            raise ConfigError(f"data.path names files of several kinds: {', '.join(sorted(builders))}")
        return _load_files(builders.pop(), files, config.split or "train")
    if len(paths) > 1:
        raise ConfigError("data.path may list files, not directories or Hub names")
    path = str(Path(paths[0]).expanduser()) if _looks_local(paths[0]) else paths[0]
    markers = {"state.json", "dataset_dict.json"}  # files that save_to_disk writes
    if os.path.isdir(path):
        _reject_hub_keys(config, "revision")
    if os.path.isdir(path) and markers & set(os.listdir(path)):
        _reject_hub_keys(config, "name")
        try:
            return _select_split(datasets.load_from_disk(path), config.split)
        except IndexError:  # `datasets` raises it where a saved dataset has no rows
            return datasets.Dataset.from_dict({})
    loaded = datasets.load_dataset(path, config.name, split=config.split, revision=config.revision)
    return _select_split(loaded, config.split)


def _reject_hub_keys(config: DataConfig, *names: str) -> None:
    """Reject keys that have no meaning for an input on disk, rather than ignore what they ask for."""
    mistakes = [
        f"data.{name}={value} is for a dataset of the Hub; data.path={config.path} is read from disk"
        for name in names
        if (value := getattr(config, name)) is not None
    ]
    if mistakes:
        raise ConfigError(*mistakes)


def _load_files(builder: str, files: list[str], split: str) -> datasets.Dataset:
    """Return the rows of files of one kind. Files without rows are skipped; without any row, the input is empty."""
    import datasets

    extra = {"sep": "\t"} if _get_data_suffix(files[0]) == ".tsv" else {}

    def load(paths: list[str]) -> datasets.Dataset:
        data_files = [glob.escape(path) for path in paths]  # `datasets` takes file names for patterns
        return datasets.load_dataset(builder, data_files=data_files, split=split, **extra)

    def has_rows(file: str) -> bool:
        try:
            return len(load([file])) > 0
        except Exception as error:
            if _is_empty_input_error(error):
                return False
            raise

    files = [file for file in files if os.path.getsize(file) > 0]
    try:
        return load(files) if files else datasets.Dataset.from_dict({})
    except Exception as error:
        if len(files) == 1 and not _is_empty_input_error(error):
            raise
        with_rows = [file for file in files if has_rows(file)]
        if with_rows == files:
            raise
        return load(with_rows) if with_rows else datasets.Dataset.from_dict({})


def _find_files(path: str) -> list[str]:
    """Return the files that a path or glob names; none if it is a directory or may be a Hub name."""
    expanded = str(Path(path).expanduser())
    if os.path.isfile(expanded):
        return [expanded]
    if os.path.isdir(expanded):
        return []
    if glob.has_magic(path):
        files = sorted(file for file in glob.glob(expanded, recursive=True) if os.path.isfile(file))
        if not files:
            raise ConfigError(f"data.path: no file matches {path}")
        return files
    if _looks_local(path):
        raise ConfigError(f"data.path: no such file or directory: {path}")
    return []


def _looks_local(path: str) -> bool:
    """Return True if a path can't be a Hub name (NAME or USER/NAME), by its form or by a data file's suffix."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _get_data_suffix(path) in _BUILDERS


def _get_data_suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in _COMPRESSIONS else suffix


def _get_builder(file: str) -> str:
    suffix = _get_data_suffix(file)
    if suffix not in _BUILDERS:
        raise ConfigError(f"data.path: {file} is none of the known kinds: {', '.join(_BUILDERS)}")
    return _BUILDERS[suffix]


def _select_split(loaded: Any, split: str | None) -> datasets.Dataset:
    import datasets

    if isinstance(loaded, datasets.Dataset):
        return loaded
    names = sorted(map(str, loaded))
    if split is None and len(names) > 1:
        raise ConfigError(f"data.split is needed: there are {', '.join(names)}")
    chosen = split or names[0]
    if chosen not in loaded:
        raise ConfigError(f"data.split={chosen}: there are only {', '.join(names)}")
    return loaded[chosen]


def _is_empty_input_error(error: Exception) -> bool:
    """Return True if `datasets` failed because the files are empty, which is no mistake."""
    names = {type(exception).__name__ for exception in (error, error.__cause__) if exception is not None}
    if names & {"StopIteration", "EmptyDataError", "SchemaInferenceError"}:
        return True
    return "corresponds to no data" in str(error)


def _find_root_cause(error: Exception) -> str:
    """Return the first line of the cause that `datasets` wraps in "An error occurred while generating the dataset"."""
    root: BaseException = error.__cause__ or error
    lines = str(root).strip().splitlines()
    return lines[0] if lines else type(root).__name__


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _canonical_bytes(table: pa.Table) -> bytes:
    """Return a table's content as bytes that depend neither on its Arrow chunks nor on the rows around it."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    # Taken, not sliced: a slice's bitmaps end with bits of the rows that follow, e.g. those beyond `data.limit`.
    bare = table.take(np.arange(table.num_rows)).combine_chunks().replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, bare.schema) as writer:
        writer.write_table(bare)
    return bytes(sink.getvalue())
