"""Group rows whose prompts share a prefix of 256, 512, ... or 65,536 characters.

- Prefixes are compared by hashes of the text: tokenizing a whole dataset takes longer than a good order saves.
- A collision of two 32-bit hashes groups rows that share nothing. That costs a little time and changes no result.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpgen.data.input_rows import InputRows
from dpgen.errors import RenderTimeout

MIN_PREFIX_CHARS = 256  # shorter prefixes are not worth an order: they fill a few blocks of a prefix cache
_LEVELS = tuple(MIN_PREFIX_CHARS * 2**power for power in range(9))  # up to 65,536 characters
_MIN_GROUPS = 8  # a prefix that more than an eighth of all rows share stays cached in any order


class SlowRow(Exception):
    """Report a row whose prompt takes too long to render, so that the caller groups the other rows.

    Other ranks may render the same row just in time. A rank that merely left out the prompt would order the rows
    differently than these.
    """

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


class PrefixGroups:
    """Group rows by the prefixes of their prompts.

    Two rows are in one group if they share the shortest prefix that at most an eighth of all rows have in common. A
    prefix of more rows (a system prompt) stays cached in any order, so it makes no group.

    Args:
        lengths: characters of each prompt, int64[num_rows]; 0 for a row without a prompt.
        hashes: for each level (a number of characters), a hash of each prompt's prefix of that length,
            uint32[num_levels, num_rows]. A prompt shorter than a level shares nothing at this level.
        prompt_hashes: a hash of each whole prompt, int64[num_rows]; 0 for a row without a prompt.

    Attributes:
        uncached_chars: characters of each prompt that must be computed if groups stay together: those beyond the
            shared prefix, and the row's part of the prefix; float64[num_rows].
    """

    def __init__(self, lengths: np.ndarray, hashes: np.ndarray, prompt_hashes: np.ndarray) -> None:
        self.lengths, self._hashes, self.prompt_hashes = lengths, hashes, prompt_hashes
        num_rows = len(lengths)
        self._group = np.full(num_rows, -1, dtype=np.int64)
        cached_chars = np.zeros(num_rows)
        max_rows = max(2, num_rows // _MIN_GROUPS)
        num_groups = shorter = 0
        for level, width in enumerate(_LEVELS):
            rows = np.flatnonzero(lengths >= width)
            _, prefix, counts = np.unique(hashes[level][rows], return_inverse=True, return_counts=True)
            size = counts[prefix]
            is_new = (self._group[rows] < 0) & (size > 1) & (size <= max_rows)
            self._group[rows[is_new]] = num_groups + prefix[is_new]
            num_groups += len(counts)
            is_grouped = self._group[rows] >= 0
            cached_chars[rows] += np.where(is_grouped, (width - shorter) * (1 - 1 / size), 0)
            shorter = width
        self.uncached_chars = lengths - cached_chars

    @property
    def shared_fraction(self) -> float:
        """Return the fraction of all prompts' characters that need not be computed if groups stay together."""
        return float(1 - self.uncached_chars.sum() / max(1, self.lengths.sum()))

    @property
    def num_groups(self) -> int:
        return len(np.unique(self._group[self._group >= 0]))

    @property
    def num_grouped_rows(self) -> int:
        return int((self._group >= 0).sum())

    def sort_by_group(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows' positions sorted by group, int64[num_rows], and where groups begin there, int64[num_groups].

        Groups come in the order of their first rows. Within a group, rows that share longer prefixes are neighbours. A
        row without a group is a group of its own.
        """
        positions = np.arange(len(self.lengths))
        group = np.where(self._group < 0, self._group.max(initial=-1) + 1 + positions, self._group)
        _, first, group = np.unique(group, return_index=True, return_inverse=True)
        order = np.lexsort((positions, *self._hashes[::-1], first[group]))
        return order, np.flatnonzero(np.diff(first[group][order], prepend=-1))


def group_by_prefix(
    rows: InputRows, row_ids: np.ndarray, columns: Sequence[str], text_of: Callable[[int, Mapping[str, Any]], str]
) -> PrefixGroups:
    """Read the prompts of some rows and group them.

    Args:
        row_ids: indices of the rows, int64[num_rows].
        columns: columns that `text_of` reads.
        text_of: returns a row's prompt, given its index and columns. Where it raises, the row has no prompt.

    Raises:
        SlowRow: `text_of` raised RenderTimeout.
    """
    lengths = np.zeros(len(row_ids), dtype=np.int64)
    hashes = np.zeros((len(_LEVELS), len(row_ids)), dtype=np.uint32)
    prompt_hashes = np.zeros(len(row_ids), dtype=np.int64)
    for position, row in enumerate(rows.iter_rows(row_ids, columns)):
        try:
            text = text_of(int(row_ids[position]), row)
        except RenderTimeout:
            raise SlowRow(int(row_ids[position])) from None
        except Exception:  # noqa: BLE001 - a template is a program; rendering rejects the row later, with the reason
            continue
        lengths[position] = len(text)
        value = start = 0
        for level, stop in enumerate(_LEVELS):
            if len(text) < stop:
                break
            value = _hash(text[start:stop], value)
            hashes[level, position] = value
            start = stop
        prompt_hashes[position] = _hash(text[start:], value) + (len(text) << 32)
    return PrefixGroups(lengths, hashes, prompt_hashes)


def _hash(text: str, value: int) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"), value)
