"""Who generates which row: a cursor for every shard, moved by atomic adds, and help for the fullest shard.

Pure logic over a store with one operation, `add`: the same code runs over the c10d store, over a dictionary in a
world of one, and in virtual time. A cursor only ever grows, so each position of each shard is claimed once, and
"every shard is used up" stays true once it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpgen.collectives import Store


@dataclass(frozen=True)
class Claim:
    """Positions start..stop of a shard, which this rank alone will generate."""

    shard: int
    start: int
    stop: int


class Claims:
    """This rank's claims.

    Args:
        store: holds the cursors, under `prefix`; the prefix is new for each attempt at the run.
        shard_sizes: the rows in every rank's shard.
        rank: whose claims these are; its own shard is claimed first.
        steal: whether to help other shards when the own one is used up.
        max_rows: the most rows a claim takes.
    """

    def __init__(
        self, store: Store, prefix: str, shard_sizes: Sequence[int], rank: int, *, steal: bool, max_rows: int
    ) -> None:
        self._store, self._prefix = store, prefix
        self._sizes = list(shard_sizes)
        self._rank, self._steal, self._max_rows = rank, steal, max_rows
        self._seen = [0] * len(self._sizes)  # each cursor, as far as this rank knows
        self._exhausted = False

    def take(self) -> Claim | None:
        """The next rows for this rank; None once there are none to be had, ever."""
        claim = self._take_from(self._rank)
        while claim is None and self._steal and not self._exhausted:
            fullest = self._fullest()
            if fullest is None:
                break
            claim = self._take_from(fullest)  # None if others emptied it meanwhile: then look again
        self._exhausted = claim is None
        return claim

    def _take_from(self, shard: int) -> Claim | None:
        size, seen = self._sizes[shard], self._seen[shard]
        if seen >= size:
            return None
        # Guided self-scheduling (Polychronopoulos & Kuck, 1987): a share of what is left, so that claims shrink
        # towards the end and no rank sits on rows that another could start.
        wanted = max(1, min(self._max_rows, (size - seen) // (2 * len(self._sizes))))
        end = self._store.add(self._key(shard), wanted)
        self._seen[shard] = min(end, size)
        start = end - wanted
        return Claim(shard, start, min(end, size)) if start < size else None

    def _fullest(self) -> int | None:
        """The shard with the most unclaimed rows; None if all are used up."""
        for shard, size in enumerate(self._sizes):
            if self._seen[shard] < size:
                self._seen[shard] = min(self._store.add(self._key(shard), 0), size)
        left = [size - seen for size, seen in zip(self._sizes, self._seen, strict=True)]
        fullest = max(range(len(left)), key=left.__getitem__)
        return fullest if left[fullest] > 0 else None

    def _key(self, shard: int) -> str:
        return f"{self._prefix}/{shard}"
