"""Which rows first, and which together: the order of work, chosen from what a look at the data shows.

A job takes as long as its slowest rank. Long rows that start last leave one engine nearly empty and the others idle, so
where something tells which rows are long they go first (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
Rows that share long beginnings go to one rank, one after the other, where its prefix cache still has them.

Every rank computes the same order from the same rows. It changes how fast results come, never what they are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows
from dpgen.formatting import format_count
from dpgen.scheduling.prefix_groups import PrefixGroups, group_by_prefix
from dpgen.scheduling.prompt_groups import LengthTracker, PromptGroups, RankState, group_by_prompt

_SAMPLE_ROWS = 20_000  # the quick look
_MIN_HINT_TAIL_RATIO = 2.0  # of longest_first by hints: the longest hundredth against the middle
_MIN_PROMPT_TAIL_RATIO = 4.0  # ... by the prompts' lengths, which say less of how long the answers get
_LONG_PROMPT_CHARS = 1_000  # shorter ones cost little, whatever their order
_MIN_SHARED_FRACTION = 0.25  # of all prompt text that is shared, from which on sharing is worth an order of its own
_CHARS_PER_TOKEN = 4
_MIN_CHUNKS_PER_SHARD = 32  # claims that a shard of groups is made of, at least
_MIN_GROUPED_FRACTION = (
    0.5  # of all rows that have the same prompt as another, from which on the first of them go first
)
_ASSUMED_OUTPUT_TOKENS = 256  # what a row is taken to generate, to weigh it against its prompt

PromptTextFn = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class RowOrder:
    """Rows in order of work, and how they are split into shards.

    Attributes:
        rows: row indices, int64.
        kind: "dataset", "longest_first" or "prefix".
        reason: why this order, as the end of a sentence.
        groups: of "prefix": where each group of rows that belong together begins in `rows`.
        weights: of "prefix": each row's work, in arbitrary units.
        siblings: which rows have the same prompt, where their lengths are to be learnt from each other.
        num_leaders: rows at the front whose lengths tell those of others: when half of them are through it is time
            to deal what is left anew, by `order_by_measured_lengths`.
        lessons: makes what a rank is to learn before that.
    """

    rows: np.ndarray
    kind: str = "dataset"
    reason: str = ""
    groups: np.ndarray | None = None
    weights: np.ndarray | None = None
    prompt_groups: PromptGroups | None = None
    num_probes: int = 0
    make_tracker: Callable[[], LengthTracker | None] = lambda: None

    def __str__(self) -> str:
        return f"order of work: {self.kind}" + (f"; {self.reason}" if self.reason else "")

    def shard(self, num_shards: int, max_rows: int) -> ShardSpec:
        """Deals the rows to shards.

        Rows one by one are dealt round-robin, so that a shard has its share of the first and of the last: neighbours
        in a file tend to be alike. Groups are dealt whole, the heaviest first, each to the shard that has least; only
        those that would be half a shard are cut before.

        Args:
            most_rows: the most rows that a rank is to take at a time.
        """
        if self.groups is None or self.weights is None:
            return ShardSpec([len(range(shard, len(self.rows), num_shards)) for shard in range(num_shards)])
        parts = _split_groups(self.groups, len(self.rows), len(self.rows) // (2 * num_shards))
        weights = np.add.reduceat(self.weights, parts)
        dealt: list[list[int]] = [[] for _ in range(num_shards)]
        loads = [(0.0, shard) for shard in range(num_shards)]
        for part in np.argsort(-weights, kind="stable").tolist():
            load, shard = heapq.heappop(loads)
            dealt[shard].append(part)
            heapq.heappush(loads, (load + float(weights[part]), shard))
        # Taken in pieces that get no smaller towards the end, so small ones: another rank may need to help.
        piece_rows = min(max_rows, len(self.rows) // (_MIN_CHUNKS_PER_SHARD * num_shards))
        rows = np.split(self.rows, parts[1:])
        shards = [_prefill_heads_early([rows[part] for part in sorted(mine)]) for mine in dealt]
        groups = [_to_chunks(shard, piece_rows) for shard in shards]
        return ShardSpec([len(starts) - 1 for _, starts in groups], groups)


@dataclass(frozen=True)
class ShardSpec:
    """Shards of an order.

    Attributes:
        sizes: how many things there are to claim in each: rows, or pieces of groups.
        groups: each shard's rows and where the pieces begin in them; None where shards are every n-th row.
    """

    sizes: list[int]
    groups: list[tuple[np.ndarray, np.ndarray]] | None = None


def _prefill_heads_early(parts: list[np.ndarray]) -> list[np.ndarray]:
    """The same rows, each part's first one in the part before.

    Rows that are computed in one step do not find each other's beginning in the prefix cache: so the first row of a
    part is through when the others of it come.
    """
    leaders = [part[:1] for part in [*parts[1:], parts[0][:0]]] if parts else []
    moved = [np.concatenate([leader, part[1:]]) for leader, part in zip(leaders, parts, strict=True)]
    return [part for part in [*(first[:1] for first in parts[:1]), *moved] if len(part)]


def _to_chunks(parts: list[np.ndarray], max_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A shard's rows, and where the pieces that are claimed begin in them, with their number at the end."""
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    begins = np.cumsum([0, *map(len, parts)])[:-1].astype(np.int64)
    return rows, np.append(_split_groups(begins, len(rows), max_rows), len(rows))


def _split_groups(begins: np.ndarray, num_rows: int, max_rows: int) -> np.ndarray:
    """Where parts of at most so many rows begin, given where the whole groups do."""
    within: np.ndarray = np.arange(num_rows) - np.repeat(begins, np.diff(begins, append=num_rows))
    return np.flatnonzero(within % max(1, max_rows) == 0)


def order_rows(config: Config, rows: InputRows, todo: np.ndarray, text_of: PromptTextFn) -> RowOrder:
    """The order in which to generate rows.

    Args:
        todo: indices of the rows to generate, int64, ascending.
        text_of: a row's prompt as text; only compared with other rows', and measured. May raise: then the row has none.
    """
    hint = _hint_column(config)
    if config.work.order == "dataset" or len(todo) < 2:
        return RowOrder(todo)
    if config.work.order == "prefix":
        prefixes = group_by_prefix(rows, todo, config.prompt.columns(rows.columns), text_of)
        if prefixes.num_groups == 0:
            return RowOrder(todo, reason="no prompts begin alike")
        return _prefix_order(rows, todo, prefixes, hint)
    if config.work.order == "longest_first":
        return _longest_first(config, rows, todo, hint, text_of)
    return _choose_order(config, rows, todo, hint, text_of)


def _choose_order(
    config: Config, rows: InputRows, todo: np.ndarray, hint: str | None, text_of: PromptTextFn
) -> RowOrder:
    """What a look at some of the rows suggests."""
    sample = _sample(todo)
    columns = config.prompt.columns(rows.columns)
    seen = group_by_prefix(rows, sample, columns, text_of)
    caches = config.engine.get("enable_prefix_caching", True)
    if hint is None and (seen.lengths.mean() < _LONG_PROMPT_CHARS or not caches):
        _, num_with_siblings = group_by_prompt(len(rows), sample, seen.prompt_hashes)
        # Of a part of the rows only neighbours, which are half of it, show their siblings.
        share = _MIN_GROUPED_FRACTION if len(sample) == len(todo) else _MIN_GROUPED_FRACTION / 2
        if num_with_siblings >= share * len(sample):
            by_siblings = _longest_first(config, rows, todo, None, text_of)
            if by_siblings.prompt_groups is not None:
                return by_siblings
    if caches and seen.shared_fraction >= _MIN_SHARED_FRACTION:
        prefixes = seen if len(sample) == len(todo) else group_by_prefix(rows, todo, columns, text_of)
        return _prefix_order(rows, todo, prefixes, hint)
    if hint is not None:
        values = rows.read_numbers(hint, sample)
        if _compute_tail_ratio(values) >= _MIN_HINT_TAIL_RATIO:
            return _longest_first(config, rows, todo, hint, text_of)
        return RowOrder(todo, reason=f"{hint} differs little from row to row")
    if _compute_tail_ratio(seen.lengths) >= _MIN_PROMPT_TAIL_RATIO and seen.lengths.mean() >= _LONG_PROMPT_CHARS:
        return _longest_first(config, rows, todo, None, text_of)
    return RowOrder(todo, reason="nothing tells which rows are long, and their prompts begin differently")


def _longest_first(
    config: Config, rows: InputRows, todo: np.ndarray, hint: str | None, text_of: PromptTextFn
) -> RowOrder:
    if hint is None:
        prompts = group_by_prefix(rows, todo, config.prompt.columns(rows.columns), text_of)
        prompt_groups, num_with_siblings = group_by_prompt(len(rows), todo, prompts.prompt_hashes)
        if num_with_siblings >= _MIN_GROUPED_FRACTION * len(todo):
            return order_by_measured_lengths(todo, prompt_groups, prompt_groups.count(RankState()))
        lengths = prompts.lengths.astype(np.float64)
        what = "the prompts' lengths"
    else:
        lengths = rows.read_numbers(hint, todo)
        what = hint if hint == config.work.hint_column else f"max_tokens ({hint})"
    known = lengths[~np.isnan(lengths)]
    # A row that says nothing may be as long as any.
    lengths = np.where(np.isnan(lengths), known.max() if len(known) else 0, lengths)
    low, middle, high = _compute_min_median_max(known) if len(known) else (0, 0, 0)
    reason = f"by {what}: {low:,.0f} to {high:,.0f}, half of them below {middle:,.0f}"
    return RowOrder(todo[np.argsort(-lengths, kind="stable")], "longest_first", reason)


def order_by_measured_lengths(todo: np.ndarray, prompt_groups: PromptGroups, counts: np.ndarray) -> RowOrder:
    """Longest first, by what the ranks have learnt of rows with the same prompts; see `PromptGroups.sort`."""
    ordered, num_probes = prompt_groups.sort(todo, counts)
    expected = prompt_groups.estimate_lengths(todo, counts)
    known = expected[np.isfinite(expected)]
    if len(known):
        low, middle, high = _compute_min_median_max(known)
        reason = (
            f"by what rows with the same prompt have taken: {low:,.0f} to {high:,.0f} tokens, half of them below "
            f"{middle:,.0f}; {format_count(int(np.isposinf(expected).sum()), 'row')} of prompts that are "
            "still running first"
        )
    elif num_probes == 0:
        reason = "what is left has siblings that still run, or none"
    else:
        reason = (
            f"{format_count(prompt_groups.num_groups, 'prompt')} have several rows each: one of each goes first, and "
            "tells how long the others get"
        )
    return RowOrder(
        ordered,
        "longest_first",
        reason,
        prompt_groups=prompt_groups,
        num_probes=num_probes,
        make_tracker=lambda: prompt_groups.make_tracker(todo, counts),
    )


def _prefix_order(rows: InputRows, todo: np.ndarray, prefixes: PrefixGroups, hint: str | None) -> RowOrder:
    order, groups = prefixes.sort_by_group()
    tokens = np.full(len(todo), float(_ASSUMED_OUTPUT_TOKENS))
    if hint is not None:
        values = rows.read_numbers(hint, todo)
        tokens = np.where(np.isnan(values), tokens, values)
    weights = tokens + prefixes.uncached_chars / _CHARS_PER_TOKEN
    reason = (
        f"{prefixes.num_grouped_rows:,} of {len(todo):,} prompts begin as others do, in "
        f"{format_count(prefixes.num_groups, 'group')}; {100 * prefixes.shared_fraction:.0f} % of all prompt text need "
        "not be computed twice"
    )
    return RowOrder(todo[order], "prefix", reason, groups, weights[order])


def _hint_column(config: Config) -> str | None:
    """The column that says most of how long rows get."""
    return config.work.hint_column or config.sampling_columns.get("max_tokens")


def _sample(todo: np.ndarray) -> np.ndarray:
    """Some of the rows: half of them neighbours, since what belongs together often stands together."""
    if len(todo) <= _SAMPLE_ROWS:
        return todo
    blocks = np.linspace(0, len(todo) - 500, _SAMPLE_ROWS // 1000).astype(np.int64)
    together = (blocks[:, None] + np.arange(500)).ravel()
    apart = np.random.default_rng(0).choice(len(todo), _SAMPLE_ROWS // 2, replace=False)
    sample: np.ndarray = todo[np.unique(np.concatenate([together, apart]))]
    return sample


def _compute_tail_ratio(values: np.ndarray) -> float:
    """How much longer the longest hundredth is than the middle."""
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    if not len(known):
        return 1.0
    middle, high = np.quantile(known, [0.5, 0.99])
    return float(high / max(middle, 1))


def _compute_min_median_max(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.0, 0.5, 1.0])
    return float(low), float(middle), float(high)
