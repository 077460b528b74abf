"""Choose some of a journal's frames, each row with the same chance, while its segments stream by.

- A row is chosen by a hash of its index, so its frames in several segments are chosen together, and the same rows each
  time.
- Memory is bounded by the size of the sample and by one segment's index, however many rows there are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dpgen.journal.format import Frames


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """Return well-mixed hashes of row indices (splitmix64), uint64[num_rows]."""
    mixed = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return hashes


class RowSampler:
    """Keep the frames of the rows with the smallest hashes.

    Args:
        max_frames: that are kept.

    Attributes:
        num_seen: frames that were added.
    """

    def __init__(self, max_frames: int) -> None:
        self._max_frames = max_frames
        self.num_seen = 0
        self._paths: list[Path] = []
        self._file = np.empty(0, np.int32)
        self._frames = Frames(*_make_empty_arrays())

    def add(self, path: Path, frames: Frames) -> None:
        """Take the frames of one segment."""
        self.num_seen += len(frames)
        self._paths.append(path)
        file = np.concatenate([self._file, np.full(len(frames), len(self._paths) - 1, np.int32)])
        names = ("row", "offset", "length", "error", "attempt")
        joined = Frames(*(np.concatenate([getattr(self._frames, name), getattr(frames, name)]) for name in names))
        if len(joined) > self._max_frames:
            kept = np.sort(np.argpartition(hash_rows(joined.row), self._max_frames)[: self._max_frames])
            joined, file = joined.select(kept), file[kept]
        self._frames, self._file = joined, file

    def get_segments(self) -> list[tuple[Path, Frames]]:
        """Return the chosen frames by segment, in the order in which segments were added."""
        return [(self._paths[file], self._frames.select(self._file == file)) for file in np.unique(self._file).tolist()]


def _make_empty_arrays() -> tuple[np.ndarray, ...]:
    return (
        *(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint32)),
        *(np.empty(0, bool), np.empty(0, bool)),
    )
