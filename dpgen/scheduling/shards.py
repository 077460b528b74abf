"""Say which rows of an order belong to which shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dpgen.data.input_rows import InputRows
from dpgen.data.row_view import Shard

_GOLDEN_RATIO = (5**0.5 - 1) / 2  # of all ratios, the one whose multiples, modulo 1, are spread most evenly


@dataclass(frozen=True)
class ShardSpec:
    """Shards of an order.

    Attributes:
        sizes: positions to claim in each shard: rows, or chunks of prefix groups.
        groups: of each shard, its rows (int64[num_rows]) and where its chunks begin in them, with their end
            (int64[num_chunks + 1]); None where the shards hold single rows: those after the blocks, in turn.
        head_starts: where the blocks at the order's front begin, with their end, int64[num_blocks + 1]. They are the
            chunks of a further shard, number `len(sizes)`. As many shards, the first, are empty: their ranks steal.
    """

    sizes: list[int]
    groups: list[tuple[np.ndarray, np.ndarray]] | None = None
    head_starts: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    @property
    def num_heads(self) -> int:
        return len(self.head_starts) - 1

    def get_chunks(self, rows: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return rows and starts of the chunks of shard `index`, as in `groups`; None for a shard of single rows."""
        if index == len(self.sizes):
            return rows[: self.head_starts[-1]], self.head_starts
        return None if self.groups is None else self.groups[index]

    def list_rows(self, rows: np.ndarray, index: int) -> np.ndarray:
        """Return the rows of shard `index`, int64[num_rows]; `rows` are those of the order."""
        chunks = self.get_chunks(rows, index)
        return self.take(rows, index) if chunks is None else chunks[0]

    def list_first_rows(self, rows: np.ndarray, index: int) -> np.ndarray:
        """Return the rows of shard `index`, or of the block that its rank gets if ranks come in order."""
        if index < self.num_heads:
            return rows[self.head_starts[index] : self.head_starts[index + 1]]
        return self.list_rows(rows, index)

    def take(self, values: np.ndarray, index: int) -> np.ndarray:
        """Return those of the order's values that belong to shard `index`, which is one of single rows."""
        return values[self.head_starts[-1] :][index - self.num_heads :: len(self.sizes) - self.num_heads]

    def open(self, input_rows: InputRows, rows: np.ndarray, index: int, columns: Sequence[str]) -> Shard:
        """Return shard `index` of the input; `rows` are those of the order."""
        chunks = self.get_chunks(rows, index)
        if chunks is not None:
            return input_rows.shard_in_chunks(*chunks, columns)
        return input_rows.shard(self.take(rows, index), 1, 0, columns)


def spread_evenly(number: int, num_shards: int = 1) -> np.ndarray:
    """Return 0..number - 1 so that each run of them, dealt to shards in turn, covers the range evenly in each shard.

    These are the multiples of the golden ratio, modulo 1, by rank. All shards get the same multiple in turn, since the
    rank of every n-th one is spread evenly for some n alone.

    Returns:
        int64[number].
    """
    places = np.empty(number, dtype=np.int64)
    turns = np.arange(number) // num_shards
    places[np.argsort((turns + 1) * _GOLDEN_RATIO % 1, kind="stable")] = np.arange(number)
    return places
