"""Rows whose prompts begin alike: found by hashes of their first 256, 1,024, ... characters, not by their tokens.

Text, because tokenizing a whole dataset takes longer than it saves. A hash of 32 bits may put two rows together that
have nothing in common: that costs a little time, and changes no result.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpgen.data.input_rows import InputRows

MIN_PREFIX_CHARS = 256  # shorter beginnings are not worth an order: a few blocks of a prefix cache
_LEVELS = tuple(MIN_PREFIX_CHARS * 2**power for power in range(9))  # up to 65,536 characters
_MIN_GROUPS = 8  # beginnings that more than an eighth of all rows share stay cached in any order


class PrefixGroups:
    """Which rows' prompts begin alike.

    Two rows are of one group where they share the shortest beginning that not too many rows have in common: what more
    than an eighth of all rows share (a system prompt) stays cached in any order, and says nothing.

    Args:
        lengths: characters of each prompt, int64; 0 where a row has none.
        hashes: for each level (a number of characters), a hash of each prompt's beginning of that length, uint32 of
            shape (levels, rows). Prompts shorter than a level share nothing at it.
        whole: a hash of each whole prompt, int64; 0 where a row has none.

    Attributes:
        own_chars: characters of each prompt that are to be computed if the groups stay together: those beyond what
            it shares, and its part of the shared ones; float64.
    """

    def __init__(self, lengths: np.ndarray, hashes: np.ndarray, prompt_hashes: np.ndarray) -> None:
        self.lengths, self._hashes, self.prompt_hashes = lengths, hashes, prompt_hashes
        num_rows = len(lengths)
        self._group = np.full(num_rows, -1, dtype=np.int64)
        saved = np.zeros(num_rows)
        most = max(2, num_rows // _MIN_GROUPS)
        num_groups = width_before = 0
        for level, width in enumerate(_LEVELS):
            here = np.flatnonzero(lengths >= width)
            _, found, counts = np.unique(hashes[level][here], return_inverse=True, return_counts=True)
            size = counts[found]
            new = (self._group[here] < 0) & (size > 1) & (size <= most)
            self._group[here[new]] = num_groups + found[new]
            num_groups += len(counts)
            grouped = self._group[here] >= 0
            saved[here] += np.where(grouped, (width - width_before) * (1 - 1 / size), 0)
            width_before = width
        self.uncached_chars = lengths - saved

    @property
    def shared_fraction(self) -> float:
        """What need not be computed if the groups stay together, as a share of all prompts' characters."""
        return float(1 - self.uncached_chars.sum() / max(1, self.lengths.sum()))

    @property
    def num_groups(self) -> int:
        return len(np.unique(self._group[self._group >= 0]))

    @property
    def num_grouped_rows(self) -> int:
        return int((self._group >= 0).sum())

    def sort_by_group(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the rows such that groups stand together, and where each group begins there.

        Groups come in the order of their first rows, and within a group rows that share still more are neighbours. A
        row of no group is one by itself.
        """
        row_ids = np.arange(len(self.lengths))
        group = np.where(self._group < 0, self._group.max(initial=-1) + 1 + row_ids, self._group)
        _, first, group = np.unique(group, return_index=True, return_inverse=True)
        order = np.lexsort((row_ids, *self._hashes[::-1], first[group]))
        return order, np.flatnonzero(np.diff(first[group][order], prepend=-1))


def group_by_prefix(
    rows: InputRows, row_ids: np.ndarray, columns: Sequence[str], text_of: Callable[[Mapping[str, Any]], str]
) -> PrefixGroups:
    """Reads the prompts of some rows.

    Args:
        places: indices of the rows.
        columns: the columns that a prompt is made of.
        text_of: a row's prompt; where it raises, the row counts as one without a prompt.
    """
    lengths = np.zeros(len(row_ids), dtype=np.int64)
    hashes = np.zeros((len(_LEVELS), len(row_ids)), dtype=np.uint32)
    prompt_hashes = np.zeros(len(row_ids), dtype=np.int64)
    for place, row in enumerate(rows.iter_rows(row_ids, columns)):
        try:
            text = text_of(row)
        except Exception:  # noqa: BLE001 - a template is a program; the row is refused later, with its reason
            continue
        lengths[place] = len(text)
        value = start = 0
        for level, stop in enumerate(_LEVELS):
            if len(text) < stop:
                break
            value = _hash(text[start:stop], value)
            hashes[level, place] = value
            start = stop
        prompt_hashes[place] = _hash(text[start:], value) + (len(text) << 32)
    return PrefixGroups(lengths, hashes, prompt_hashes)


def _hash(text: str, value: int) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"), value)
