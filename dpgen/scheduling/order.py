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
from dpgen.data.input_rows import Rows
from dpgen.formatting import counted
from dpgen.scheduling.prefix_groups import Prefixes, find_prefixes
from dpgen.scheduling.prompt_groups import Hand, Lessons, Siblings, find_siblings

_SAMPLE_ROWS = 20_000  # the quick look
_VARIED = 2.0  # of longest_first by hints: the longest hundredth against the middle
_VERY_VARIED = 4.0  # ... by the prompts' lengths, which say less of how long the answers get
_LONG_PROMPT_CHARS = 1_000  # shorter ones cost little, whatever their order
_SHARED_SHARE = 0.25  # of all prompt text that is shared, from which on sharing is worth an order of its own
_CHARS_PER_TOKEN = 4
_PIECES = 32  # claims that a shard of groups is made of, at least
_SIBLING_SHARE = 0.5  # of all rows that have the same prompt as another, from which on the first of them go first
_USUAL_TOKENS = 256  # what a row is taken to generate, to weigh it against its prompt

TextOf = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Order:
    """Rows in order of work, and how they are split into shards.

    Attributes:
        rows: row indices, int64.
        kind: "dataset", "longest_first" or "prefix".
        reason: why this order, as the end of a sentence.
        groups: of "prefix": where each group of rows that belong together begins in `rows`.
        weights: of "prefix": each row's work, in arbitrary units.
        siblings: which rows have the same prompt, where their lengths are to be learnt from each other.
        num_leaders: rows at the front whose lengths tell those of others: when half of them are through it is time
            to deal what is left anew, by `order_learnt`.
        lessons: makes what a rank is to learn before that.
    """

    rows: np.ndarray
    kind: str = "dataset"
    reason: str = ""
    groups: np.ndarray | None = None
    weights: np.ndarray | None = None
    siblings: Siblings | None = None
    num_leaders: int = 0
    lessons: Callable[[], Lessons | None] = lambda: None

    def __str__(self) -> str:
        return f"order of work: {self.kind}" + (f"; {self.reason}" if self.reason else "")

    def split(self, num_shards: int, most_rows: int) -> Split:
        """Deals the rows to shards.

        Rows one by one are dealt round-robin, so that a shard has its share of the first and of the last: neighbours
        in a file tend to be alike. Groups are dealt whole, the heaviest first, each to the shard that has least; only
        those that would be half a shard are cut before.

        Args:
            most_rows: the most rows that a rank is to take at a time.
        """
        if self.groups is None or self.weights is None:
            return Split([len(range(shard, len(self.rows), num_shards)) for shard in range(num_shards)])
        parts = _cut(self.groups, len(self.rows), len(self.rows) // (2 * num_shards))
        weights = np.add.reduceat(self.weights, parts)
        dealt: list[list[int]] = [[] for _ in range(num_shards)]
        loads = [(0.0, shard) for shard in range(num_shards)]
        for part in np.argsort(-weights, kind="stable").tolist():
            load, shard = heapq.heappop(loads)
            dealt[shard].append(part)
            heapq.heappush(loads, (load + float(weights[part]), shard))
        # Taken in pieces that get no smaller towards the end, so small ones: another rank may need to help.
        piece_rows = min(most_rows, len(self.rows) // (_PIECES * num_shards))
        rows = np.split(self.rows, parts[1:])
        shards = [_leaders_ahead([rows[part] for part in sorted(mine)]) for mine in dealt]
        groups = [_in_pieces(shard, piece_rows) for shard in shards]
        return Split([len(starts) - 1 for _, starts in groups], groups)


@dataclass(frozen=True)
class Split:
    """Shards of an order.

    Attributes:
        sizes: how many things there are to claim in each: rows, or pieces of groups.
        groups: each shard's rows and where the pieces begin in them; None where shards are every n-th row.
    """

    sizes: list[int]
    groups: list[tuple[np.ndarray, np.ndarray]] | None = None


def _leaders_ahead(parts: list[np.ndarray]) -> list[np.ndarray]:
    """The same rows, each part's first one in the part before.

    Rows that are computed in one step do not find each other's beginning in the prefix cache: so the first row of a
    part is through when the others of it come.
    """
    leaders = [part[:1] for part in [*parts[1:], parts[0][:0]]] if parts else []
    moved = [np.concatenate([leader, part[1:]]) for leader, part in zip(leaders, parts, strict=True)]
    return [part for part in [*(first[:1] for first in parts[:1]), *moved] if len(part)]


def _in_pieces(parts: list[np.ndarray], most_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A shard's rows, and where the pieces that are claimed begin in them, with their number at the end."""
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    begins = np.cumsum([0, *map(len, parts)])[:-1].astype(np.int64)
    return rows, np.append(_cut(begins, len(rows), most_rows), len(rows))


def _cut(begins: np.ndarray, num_rows: int, most_rows: int) -> np.ndarray:
    """Where parts of at most so many rows begin, given where the whole groups do."""
    within: np.ndarray = np.arange(num_rows) - np.repeat(begins, np.diff(begins, append=num_rows))
    return np.flatnonzero(within % max(1, most_rows) == 0)


def order_rows(config: Config, rows: Rows, todo: np.ndarray, text_of: TextOf) -> Order:
    """The order in which to generate rows.

    Args:
        todo: indices of the rows to generate, int64, ascending.
        text_of: a row's prompt as text; only compared with other rows', and measured. May raise: then the row has none.
    """
    hint = _hint_column(config)
    if config.work.order == "dataset" or len(todo) < 2:
        return Order(todo)
    if config.work.order == "prefix":
        prefixes = find_prefixes(rows, todo, config.prompt.columns(rows.columns), text_of)
        if prefixes.num_groups == 0:
            return Order(todo, reason="no prompts begin alike")
        return _prefix_order(rows, todo, prefixes, hint)
    if config.work.order == "longest_first":
        return _longest_first(config, rows, todo, hint, text_of)
    return _chosen(config, rows, todo, hint, text_of)


def _chosen(config: Config, rows: Rows, todo: np.ndarray, hint: str | None, text_of: TextOf) -> Order:
    """What a look at some of the rows suggests."""
    sample = _sample(todo)
    columns = config.prompt.columns(rows.columns)
    seen = find_prefixes(rows, sample, columns, text_of)
    caches = config.engine.get("enable_prefix_caching", True)
    if hint is None and (seen.lengths.mean() < _LONG_PROMPT_CHARS or not caches):
        _, num_with_siblings = find_siblings(len(rows), sample, seen.whole)
        # Of a part of the rows only neighbours, which are half of it, show their siblings.
        share = _SIBLING_SHARE if len(sample) == len(todo) else _SIBLING_SHARE / 2
        if num_with_siblings >= share * len(sample):
            by_siblings = _longest_first(config, rows, todo, None, text_of)
            if by_siblings.siblings is not None:
                return by_siblings
    if caches and seen.shared_share >= _SHARED_SHARE:
        prefixes = seen if len(sample) == len(todo) else find_prefixes(rows, todo, columns, text_of)
        return _prefix_order(rows, todo, prefixes, hint)
    if hint is not None:
        values = rows.numbers(hint, sample)
        if _spread(values) >= _VARIED:
            return _longest_first(config, rows, todo, hint, text_of)
        return Order(todo, reason=f"{hint} differs little from row to row")
    if _spread(seen.lengths) >= _VERY_VARIED and seen.lengths.mean() >= _LONG_PROMPT_CHARS:
        return _longest_first(config, rows, todo, None, text_of)
    return Order(todo, reason="nothing tells which rows are long, and their prompts begin differently")


def _longest_first(config: Config, rows: Rows, todo: np.ndarray, hint: str | None, text_of: TextOf) -> Order:
    if hint is None:
        prompts = find_prefixes(rows, todo, config.prompt.columns(rows.columns), text_of)
        siblings, num_with_siblings = find_siblings(len(rows), todo, prompts.whole)
        if num_with_siblings >= _SIBLING_SHARE * len(todo):
            return order_learnt(todo, siblings, siblings.count(Hand()))
        lengths = prompts.lengths.astype(np.float64)
        what = "the prompts' lengths"
    else:
        lengths = rows.numbers(hint, todo)
        what = hint if hint == config.work.hint_column else f"max_tokens ({hint})"
    known = lengths[~np.isnan(lengths)]
    # A row that says nothing may be as long as any.
    lengths = np.where(np.isnan(lengths), known.max() if len(known) else 0, lengths)
    low, middle, high = _quantiles(known) if len(known) else (0, 0, 0)
    reason = f"by {what}: {low:,.0f} to {high:,.0f}, half of them below {middle:,.0f}"
    return Order(todo[np.argsort(-lengths, kind="stable")], "longest_first", reason)


def order_learnt(todo: np.ndarray, siblings: Siblings, counts: np.ndarray) -> Order:
    """Longest first, by what the ranks have learnt of rows with the same prompts; see `Siblings.order`."""
    ordered, num_leaders = siblings.order(todo, counts)
    expected = siblings.expected(todo, counts)
    known = expected[np.isfinite(expected)]
    if len(known):
        low, middle, high = _quantiles(known)
        reason = (
            f"by what rows with the same prompt have taken: {low:,.0f} to {high:,.0f} tokens, half of them below "
            f"{middle:,.0f}; {counted(int(np.isposinf(expected).sum()), 'row')} of prompts that are still running first"
        )
    elif num_leaders == 0:
        reason = "what is left has siblings that still run, or none"
    else:
        reason = (
            f"{counted(siblings.num_groups, 'prompt')} have several rows each: one of each goes first, and tells how "
            "long the others get"
        )
    return Order(
        ordered,
        "longest_first",
        reason,
        siblings=siblings,
        num_leaders=num_leaders,
        lessons=lambda: siblings.lessons(todo, counts),
    )


def _prefix_order(rows: Rows, todo: np.ndarray, prefixes: Prefixes, hint: str | None) -> Order:
    order, groups = prefixes.together()
    tokens = np.full(len(todo), float(_USUAL_TOKENS))
    if hint is not None:
        values = rows.numbers(hint, todo)
        tokens = np.where(np.isnan(values), tokens, values)
    weights = tokens + prefixes.own_chars / _CHARS_PER_TOKEN
    reason = (
        f"{prefixes.num_grouped_rows:,} of {len(todo):,} prompts begin as others do, in "
        f"{counted(prefixes.num_groups, 'group')}; {100 * prefixes.shared_share:.0f} % of all prompt text need not be "
        "computed twice"
    )
    return Order(todo[order], "prefix", reason, groups, weights[order])


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


def _spread(values: np.ndarray) -> float:
    """How much longer the longest hundredth is than the middle."""
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    if not len(known):
        return 1.0
    middle, high = np.quantile(known, [0.5, 0.99])
    return float(high / max(middle, 1))


def _quantiles(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.0, 0.5, 1.0])
    return float(low), float(middle), float(high)
