"""Group rows whose prompts share a prefix of 256, 512, ... or 65,536 characters, and shard whole groups.

- Prefixes are compared by hashes of the text: tokenizing a whole dataset takes longer than a good order saves.
- A collision of two 32-bit hashes groups rows that share nothing. That costs a little time and changes no result.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpgen.data.input_rows import InputRows
from dpgen.errors import RenderTimeout

MIN_PREFIX_CHARS = 256  # shorter prefixes are not worth an order: they fill a few blocks of a prefix cache
_LEVELS = tuple(MIN_PREFIX_CHARS * 2**power for power in range(9))  # up to 65,536 characters
_MIN_CHUNKS_PER_SHARD = 32
_MAX_BALANCED_GROUPS = 1 << 16  # the heaviest groups, whose shards are chosen one by one
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
        num_chars = self.lengths.sum()
        return float(1 - self.uncached_chars.sum() / num_chars) if num_chars else 0.0

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
    rows: InputRows,
    row_ids: np.ndarray,
    columns: Sequence[str],
    text_of: Callable[[int, Mapping[str, Any]], str],
    find_adapter: Callable[[Mapping[str, Any]], str | None] = lambda row: None,
) -> PrefixGroups:
    """Read the prompts of some rows and group them.

    Args:
        row_ids: indices of the rows, int64[num_rows].
        columns: columns that `text_of` and `find_adapter` read.
        text_of: returns a row's prompt, given its index and columns. Where it raises, the row has no prompt.
        find_adapter: returns a row's adapter. Rows of two adapters share no prefix: vLLM caches a prefix for one.

    Raises:
        SlowRow: `text_of` raised RenderTimeout.
    """
    lengths = np.zeros(len(row_ids), dtype=np.int64)
    hashes = np.zeros((len(_LEVELS), len(row_ids)), dtype=np.uint32)
    prompt_hashes = np.zeros(len(row_ids), dtype=np.int64)
    for position, row, text in _iter_texts(rows, row_ids, columns, text_of):
        lengths[position] = len(text)
        adapter = find_adapter(row)
        value, start = 0 if adapter is None else _hash(adapter, 0), 0
        for level, stop in enumerate(_LEVELS):
            if len(text) < stop:
                break
            value = _hash(text[start:stop], value)
            hashes[level, position] = value
            start = stop
        prompt_hashes[position] = _hash(text[start:], value) + (len(text) << 32)
    return PrefixGroups(lengths, hashes, prompt_hashes)


def measure_prompts(
    rows: InputRows, row_ids: np.ndarray, columns: Sequence[str], text_of: Callable[[int, Mapping[str, Any]], str]
) -> np.ndarray:
    """Read the prompts of some rows and return their characters, int64[num_rows]; 0 for a row without a prompt.

    That is two fifths of the work of `group_by_prefix`; arguments and exceptions are the same.
    """
    lengths = np.zeros(len(row_ids), dtype=np.int64)
    for position, _, text in _iter_texts(rows, row_ids, columns, text_of):
        lengths[position] = len(text)
    return lengths


def shard_groups(
    rows: np.ndarray, groups: np.ndarray, weights: np.ndarray, num_shards: int, max_rows: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split rows into shards of whole groups; only groups of more than half a shard are split first.

    Args:
        rows: row indices in order of work, int64[num_rows].
        groups: positions in `rows` where each group begins, int64[num_groups].
        weights: each row's work, float64[num_rows].
        max_rows: the most rows of one claim.

    Returns:
        of each shard, its rows (int64[num_rows]) and where its chunks begin in them, with their end
        (int64[num_chunks + 1]).
    """
    starts = _split_groups(groups, len(rows), len(rows) // (2 * num_shards))
    sizes = np.diff(starts, append=len(rows))
    shard_of_group = _balance(np.add.reduceat(weights, starts), num_shards)
    shard_rows = _split_by_shard(np.repeat(shard_of_group, sizes), rows, num_shards)
    group_sizes = _split_by_shard(shard_of_group, sizes, num_shards)
    shards = [_prefill_heads_early(*shard) for shard in zip(shard_rows, group_sizes, strict=True)]
    # The size of a chunk doesn't shrink towards the end, so chunks are small: another rank may have to steal some.
    chunk_rows = min(max_rows, len(rows) // (_MIN_CHUNKS_PER_SHARD * num_shards))
    return [(own, np.append(_split_groups(heads, len(own), chunk_rows), len(own))) for own, heads in shards]


def _balance(weights: np.ndarray, num_shards: int) -> np.ndarray:
    """Return each group's shard, int64[num_groups]: the heaviest group first, each to the shard with the least weight.

    Of the lighter ones, millions perhaps, whole rounds go to all shards at a time: from the shard with the least weight
    to the one with the most, and back.
    """
    by_weight = np.argsort(-weights, kind="stable")
    shard_of_group = np.zeros(len(weights), dtype=np.int64)
    loads = [(0.0, shard) for shard in range(num_shards)]
    for group in by_weight[:_MAX_BALANCED_GROUPS].tolist():
        load, shard = heapq.heappop(loads)
        shard_of_group[group] = shard
        heapq.heappush(loads, (load + float(weights[group]), shard))
    load_of_shard = np.array([load for load, _ in sorted(loads, key=lambda entry: entry[1])])
    num_rounds = 2 * max(1, _MAX_BALANCED_GROUPS // (32 * num_shards))
    for start in range(_MAX_BALANCED_GROUPS, len(weights), num_rounds * num_shards):
        groups = by_weight[start : start + num_rounds * num_shards]
        lightest_first = np.argsort(load_of_shard, kind="stable")
        there_and_back = np.concatenate([lightest_first, lightest_first[::-1]])
        shards = np.tile(there_and_back, num_rounds // 2)[: len(groups)]
        shard_of_group[groups] = shards
        load_of_shard += np.bincount(shards, weights[groups], minlength=num_shards)
    return shard_of_group


def _split_by_shard(shard: np.ndarray, values: np.ndarray, num_shards: int) -> list[np.ndarray]:
    """Return the values of each shard, in their order.

    Args:
        shard: of each value, int64[num_values].
    """
    by_shard = np.argsort(shard, kind="stable")
    return np.split(values[by_shard], np.cumsum(np.bincount(shard, minlength=num_shards))[:-1])


def _prefill_heads_early(rows: np.ndarray, group_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move each group's first row to the front of the group before.

    Rows computed in one step do not find each other's prefix in the cache. So the first row of a group must be
    computed before the other rows of the group start.

    Args:
        rows: the rows of a shard, group by group, int64[num_rows].
        group_sizes: rows in each group, int64[num_groups].

    Returns:
        the rows in their new order, and where groups now begin: the first row alone is a group, too.
    """
    if len(rows) == 0:
        return rows, np.zeros(0, dtype=np.int64)
    heads = np.cumsum(group_sizes) - group_sizes
    # All rows but the first group's head and the last group's others make room for the head before them.
    place = np.arange(len(rows)) + 1
    place[heads[1:]] = heads[:-1] + 1
    place[0] = 0
    place[heads[-1] + 1 :] -= 1
    moved = np.empty_like(rows)
    moved[place] = rows
    starts = np.append(0, heads + 1)
    return moved, starts[starts < len(rows)]


def _split_groups(starts: np.ndarray, num_rows: int, max_rows: int) -> np.ndarray:
    """Return where parts of at most `max_rows` rows begin, given where whole groups begin."""
    within: np.ndarray = np.arange(num_rows) - np.repeat(starts, np.diff(starts, append=num_rows))
    return np.flatnonzero(within % max(1, max_rows) == 0)


def _iter_texts(
    rows: InputRows, row_ids: np.ndarray, columns: Sequence[str], text_of: Callable[[int, Mapping[str, Any]], str]
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield (position, columns, prompt) of each row that has a prompt."""
    for position, row in enumerate(rows.iter_rows(row_ids, list(dict.fromkeys(columns)))):
        try:
            text = text_of(int(row_ids[position]), row)
        except RenderTimeout:
            raise SlowRow(int(row_ids[position])) from None
        except Exception:  # noqa: BLE001 - a template is a program; rendering rejects the row later, with the reason
            continue
        yield position, row, text


def _hash(text: str, value: int) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"), value)
