"""Read the input rows by index, in shards. With `input_loading` the only home of Hugging Face `datasets`.

- A row is known by its index after `data.select` and `data.limit`: `row_ids` are int64 indices of this kind.
- The rows never change, and neither does their order in the input; shards only select from them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.data.input_source import InputSource
from dpgen.data.openai_batch.lines import FORMAT as BATCH_FORMAT
from dpgen.data.reading.cache import find_or_compute_fingerprint
from dpgen.data.row_view import Shard, TableView, to_float

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_READ_BATCH_ROWS = 1_000
_READ_BATCH_BYTES = 64 << 20
_HASH_BATCH_ROWS = 10_000  # part of the definition of the first version's fingerprint


class InputRows:
    """Give access to the rows of a run, after `data.select` and `data.limit`, by their index."""

    def __init__(self, dataset: datasets.Dataset, source: InputSource | None = None) -> None:
        self.dataset = dataset
        self.source = source or InputSource()
        self._views: dict[tuple[str, ...], TableView] = {}
        self._on_batch: Callable[[], None] = lambda: None

    def with_progress(self, on_batch: Callable[[], None]) -> InputRows:
        """Return the same rows; whatever reads them then calls `on_batch` after every batch.

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
    def key(self) -> str | None:
        """Return a hash of what the disk says about the files; None where there is none, as for the Hub."""
        return self.source.key

    @property
    def unreadable(self) -> dict[str, str]:
        """Return the columns that can't be read, each with the reason."""
        return {} if self.source.description is None else self.source.description.unreadable

    @property
    def has_added_nulls(self) -> bool:
        """Return True if an object's key may be null where the input has no such key."""
        return self.source.kind not in ("json", "csv", "tsv", "text", BATCH_FORMAT)

    @property
    def mean_row_bytes(self) -> float:
        """Return the bytes of a row in memory, all columns together."""
        table = self.dataset.data.table
        return float(table.nbytes / max(1, table.num_rows))

    @property
    def is_empty(self) -> bool:
        """Return True if there are no rows; then the columns may be unknown, too."""
        return len(self.dataset) == 0

    def describe(self, used_columns: Sequence[str]) -> str:
        """Return one line for the log; see `InputSource.describe`."""
        return self.source.describe(len(self), self.columns, used_columns)

    def shard(self, order: np.ndarray, num_shards: int, index: int, columns: Sequence[str] | None = None) -> Shard:
        """Return shard `index` of `num_shards` of the rows listed in `order`.

        Shards are strided, not contiguous: neighbours in a file tend to be similar, and a shard of long rows would keep
        one rank busy after the others are finished.

        Args:
            order: int64[num_rows], the indices of the remaining rows in work order.
            columns: the columns to read; None for all.
        """
        return Shard(self, order[index::num_shards], self.columns if columns is None else columns)

    def shard_in_chunks(self, row_ids: np.ndarray, starts: np.ndarray, columns: Sequence[str]) -> Shard:
        """Return a shard whose rows are claimed in chunks; see `Shard` for `row_ids` and `starts`."""
        return Shard(self, row_ids, columns, starts)

    def iter_rows(self, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows `row_ids` one by one, with these columns only."""
        for batch in self._iter_batches(np.asarray(row_ids), columns):
            for values in zip(*(batch[name] for name in columns), strict=True):
                yield dict(zip(columns, values, strict=True))

    def read_table(self, row_ids: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return the rows `row_ids`, at least one, in this order, as one Arrow table."""
        return self._get_view(columns).read(row_ids)

    def read_numbers(self, column: str, row_ids: np.ndarray) -> np.ndarray:
        """Return one column of the rows `row_ids` as float64[len(row_ids)]; NaN where it is null or not a number."""
        batches = self._iter_batches(np.asarray(row_ids), [column])
        chunks = [np.array([to_float(value) for value in batch[column]]) for batch in batches]
        return np.concatenate([np.zeros(0), *chunks])

    def fingerprint(self, num_rows: int | None = None, version: int | None = None) -> dict[str, Any]:
        """Return what identifies the input: number of rows, columns, and a hash of all contents (blake2b).

        The contents of files that were hashed before are not hashed again.

        Args:
            num_rows: of the first rows only, as if `data.limit` had cut the input there; None for all.
            version: 1 for the fingerprint that older versions of dpgen computed, which names no version.
        """
        from dpgen.data.reading import content_hash

        if num_rows is None and version is None and self.key is not None:
            import datasets

            cache, key = Path(datasets.config.HF_DATASETS_CACHE), f"{self.key} {content_hash.VERSION}"
            return find_or_compute_fingerprint(key, cache, lambda: self._hash(len(self)))
        num_rows = len(self) if num_rows is None else num_rows
        if version == 1:
            load = self.source.load_before
            before = self if load is None else InputRows(load())
            tables = before._iter_tables(_HASH_BATCH_ROWS, before.columns, num_rows, None)
            content = content_hash.hash_rows_of_version_1(tables, num_rows)
            return {"num_rows": num_rows, "columns": before.columns, "content": content}
        return self._hash(num_rows)

    def _hash(self, num_rows: int) -> dict[str, Any]:
        from dpgen.data.reading import content_hash

        tables = self._iter_tables(_HASH_BATCH_ROWS, self.columns, num_rows, _READ_BATCH_BYTES)
        content = content_hash.hash_rows(tables)
        return {"num_rows": num_rows, "columns": self.columns, "content": content, "version": content_hash.VERSION}

    def iter_tables(self, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield all rows in input order, as Arrow tables of at most `num_rows` rows, and of some 64 MB."""
        return self._iter_tables(num_rows, self.columns if columns is None else columns, len(self), _READ_BATCH_BYTES)

    def build_output_schema(self, added: pa.Schema, columns: Sequence[str] | None = None) -> pa.Schema:
        """Return the Arrow schema of the input's columns and the `added` ones, with the features of `datasets`.

        Args:
            columns: the input columns to keep; None for all.
        """
        import datasets

        kept_columns = self.columns if columns is None else columns
        known = self.dataset.features  # once: each access copies the features of all columns
        features = datasets.Features({name: known[name] for name in kept_columns if name in known})
        features.update(datasets.Features.from_arrow_schema(added))
        return features.arrow_schema

    def _iter_tables(
        self, num_rows: int, columns: Sequence[str], stop: int, max_bytes: int | None
    ) -> Iterator[pa.Table]:
        """Yield the rows before `stop`, in tables of at most `num_rows` rows."""
        view = self._get_view(columns)
        for row_ids in view.split(np.arange(min(stop, len(self))), num_rows, max_bytes):
            yield view.read(row_ids)
            self._on_batch()

    def _iter_batches(self, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
        """Yield column → values of the rows `row_ids`, a bounded number of bytes at a time."""
        from dpgen.data.reading.json_types import to_python

        view = self._get_view(columns)
        for part in view.split(row_ids, _READ_BATCH_ROWS, _READ_BATCH_BYTES):
            table = view.read(part)
            batch = {name: to_python(table[name]) for name in columns}
            self._restore_invalid(part, batch)
            yield batch
            self._on_batch()

    def _restore_invalid(self, row_ids: np.ndarray, batch: dict[str, list[Any]]) -> None:
        """Put back the text that Arrow can't hold."""
        description = self.source.description
        if description is None or not description.invalid:
            return
        base = row_ids if self.source.base is None else np.asarray(self.source.base)[row_ids]
        for position in np.flatnonzero(np.isin(base, list(description.invalid))):
            for name, text in description.invalid[int(base[position])].items():
                if name in batch:
                    batch[name][position] = json.loads(text)

    def _get_view(self, columns: Sequence[str]) -> TableView:
        key = tuple(columns)
        if key not in self._views:
            self._views[key] = TableView(self.dataset.select_columns(list(columns)).with_format("arrow"))
        return self._views[key]
