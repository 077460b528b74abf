"""Read rows of an Arrow-backed dataset by index: a bounded number of bytes at a time, and in shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


class RowReader(Protocol):
    """Interface of the rows of an input, as a shard uses it; see `dpgen.data.input_rows.InputRows`."""

    def iter_rows(self, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[dict[str, Any]]: ...


class TableView:
    """Read a dataset as Arrow tables of bounded size.

    Args:
        dataset: a `datasets.Dataset` in the format "arrow".
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        batches = dataset.data.table.to_batches()
        # A row's size is estimated by the mean of the batch that it is stored in, which is small.
        self._batch_ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
        self._row_bytes = np.array([batch.nbytes / max(1, batch.num_rows) for batch in batches])

    def read(self, row_ids: np.ndarray) -> pa.Table:
        first, last = int(row_ids[0]), int(row_ids[-1])
        if last - first + 1 == len(row_ids) and (np.diff(row_ids) == 1).all():
            return self._dataset[first : last + 1]
        return self._dataset[row_ids.tolist()]

    def split(self, row_ids: np.ndarray, max_rows: int, max_bytes: int | None) -> Iterator[np.ndarray]:
        """Yield `row_ids` in parts of at most `max_rows` rows, and about `max_bytes` or a single row."""
        start = 0
        while start < len(row_ids):
            part = row_ids[start : start + max_rows]
            if max_bytes is not None:
                sizes = np.cumsum(self._estimate_bytes(part))
                part = part[: max(1, int(np.searchsorted(sizes, max_bytes, "right")))]
            yield part
            start += len(part)

    def _estimate_bytes(self, row_ids: np.ndarray) -> np.ndarray:
        indices = self._dataset._indices
        if indices is not None:
            row_ids = indices.table.column(0).take(row_ids).to_numpy()
        return self._row_bytes[np.searchsorted(self._batch_ends, row_ids, "right")]


@dataclass(frozen=True)
class Shard:
    """Hold the rows of a shard in work order, with their indices in the input.

    Attributes:
        row_ids: int64[num_rows], the rows' indices in the input.
        columns: those that are read.
        chunk_starts: int64[num_chunks + 1], the position at which each chunk of rows starts, then the number of rows;
            None where each row is claimed alone.
    """

    rows: RowReader = field(repr=False)
    row_ids: np.ndarray
    columns: Sequence[str]
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
        row_ids = self.row_ids[start:stop]
        yield from zip(map(int, row_ids), self.rows.iter_rows(row_ids, self.columns), strict=True)


def to_float(value: Any) -> float:
    """Return a value as a number; NaN where it is none, or too large for one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
