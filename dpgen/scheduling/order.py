"""Choose the order of work from the data: which rows run first, and which rows run together.

- Every rank computes the same order from the same rows.
- An order changes how fast results come, never the results.
- Long rows go first where a hint predicts their length: long rows that start last leave one engine nearly empty and
  the other ranks idle (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
- Rows that share long prefixes go to one rank, one after the other, while its prefix cache still holds the prefix.

Limits: the choice rests on a sample of 20,000 rows; prompts are compared as text, not as tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.columns import select_prompt_columns
from dpgen.formatting import format_count
from dpgen.scheduling.groups.adapters import AdapterGroups, group_by_adapter
from dpgen.scheduling.groups.prefix_groups import PrefixGroups, group_by_prefix, measure_prompts, shard_groups
from dpgen.scheduling.groups.prompt_groups import LengthTracker, PromptGroups, RankState, group_by_prompt
from dpgen.scheduling.groups.samples import compute_tail_ratio, format_range, sample_rows
from dpgen.scheduling.order_config import OrderConfig
from dpgen.scheduling.shards import ShardSpec, spread_evenly

# longest_first needs values that vary: the 99th percentile over the median, at least. Prompt lengths predict completion
# lengths less well than hints do.
_MIN_HINT_TAIL_RATIO = 2.0
_MIN_PROMPT_TAIL_RATIO = 4.0
_LONG_PROMPT_CHARS = 1_000  # shorter prompts cost little in any order
_MIN_SHARED_FRACTION = 0.25  # of all prompt text, from which on shared prefixes are worth an order of their own
_CHARS_PER_TOKEN = 4
_MAX_EXPECTED = 1e7  # tokens of a row: a limit that stands for none (2**31 - 1, infinity) is no length
_ASSUMED_OUTPUT_TOKENS = 256  # of a row without a hint, to weigh its completion against its prompt
_ORDER_NAMES = {
    "dataset": "dataset order",
    "longest_first": "longest first",
    "prefix": "grouped by prefix",
    "mixed": "mixed lengths",
}
# Of rows that are only read, the shortest come last, so that all ranks end within one short step of each other.
_LAST_FRACTION, _MAX_LAST_ROWS = 16, 4096

# Neighbours of a file that stay together on a shard in a mixed order: fewer where these would be few blocks.
_BLOCK_ROWS, _MIN_BLOCKS = 64, 64

PromptTextFn = Callable[[int, Mapping[str, Any]], str]


@dataclass(frozen=True)
class RowOrder:
    """Rows in order of work.

    Attributes:
        rows: row indices, int64[num_rows].
        kind: "dataset", "longest_first", "prefix" or "mixed".
        reason: why or by what, to follow the name of the kind in a log line; may be empty.
        groups: positions in `rows` where each prefix group begins, int64[num_groups]; None in other orders.
        weights: each row's work in arbitrary units, float64[num_rows]; None where `groups` is.
        lengths: expected length of each row in any unit, the longest first, float32[num_rows]; None where it is not
            known, or where the rows are in another order.
        prompt_groups: rows with the same prompt, where lengths are measured on probes; None where they are not.
        num_probes: rows at the front that are probes. Once half of them are finished, the remaining rows are
            resharded by `order_by_measured_lengths`.
        num_spread: rows at the front that `spread_first` has put there.
        adapter_groups: rows with the same adapter, which `sort_by_adapter` has put together; None where it has not.
        make_tracker: makes the tracker of one rank's measured lengths until the next plan; it may return None.
    """

    rows: np.ndarray
    kind: str = "dataset"
    reason: str = ""
    groups: np.ndarray | None = None
    weights: np.ndarray | None = None
    lengths: np.ndarray | None = None
    prompt_groups: PromptGroups | None = None
    num_probes: int = 0
    num_spread: int = 0
    adapter_groups: AdapterGroups | None = None
    make_tracker: Callable[[], LengthTracker | None] = lambda: None

    def select(self, is_remaining: np.ndarray) -> RowOrder | None:
        """Return the remaining rows in the same order; None if the order lacks one of them.

        Reads no row: sorting all prompts again would leave the engines idle for as long as at the start.

        Args:
            is_remaining: bool[num_dataset_rows].
        """
        positions = np.flatnonzero(is_remaining[self.rows])
        if len(positions) != np.count_nonzero(is_remaining):
            return None
        groups, weights = self._regroup(positions)
        lengths = None if self.lengths is None else self.lengths[positions]
        order = RowOrder(self.rows[positions], self.kind, "(as in the first plan)", groups, weights, lengths)
        return dataclasses.replace(order, adapter_groups=self.adapter_groups)

    def spread_first(self) -> RowOrder:
        """Return the order with a few rows from all of its parts at the front, the last row first.

        Picks the last row, and those 2, 4, 8, ... positions from the end. So wherever some rows differ from those at
        the front, one of them is likely to be picked: at the end, or before rows that differ from both.
        """
        num_rows = len(self.rows)
        picked = num_rows - 2 ** np.arange(num_rows.bit_length())
        groups, weights = self._regroup(
            positions := np.append(picked, np.delete(np.arange(num_rows), picked)), len(picked)
        )
        return dataclasses.replace(
            self,
            rows=self.rows[positions],
            groups=groups,
            weights=weights,
            lengths=None,
            num_probes=self.num_probes and self.num_probes + len(picked),
            num_spread=len(picked),
        )

    def sort_by_adapter(self, adapter_groups: AdapterGroups | None) -> RowOrder:
        """Return the order with the rows of each adapter together, after the probes; the same order without groups."""
        if adapter_groups is None:
            return self
        groups, weights = self._regroup(positions := adapter_groups.sort(self.rows, self.num_probes))
        order = dataclasses.replace(self, rows=self.rows[positions], groups=groups, weights=weights, lengths=None)
        return dataclasses.replace(order, adapter_groups=adapter_groups)

    def put_last(self, rows: Collection[int]) -> RowOrder:
        """Return the order with these of its rows at its end."""
        is_last = np.isin(self.rows, list(rows))
        groups, weights = self._regroup(positions := np.argsort(is_last, kind="stable"))
        num_probes, num_spread = (int((~is_last[:number]).sum()) for number in (self.num_probes, self.num_spread))
        lengths = None if self.lengths is None else self.lengths[positions]
        order = dataclasses.replace(self, rows=self.rows[positions], groups=groups, weights=weights, lengths=lengths)
        return dataclasses.replace(order, num_probes=num_probes, num_spread=num_spread)

    def mix(self, num_shards: int, num_last: int = 0) -> RowOrder:
        """Return the rows so that any number of them from the front is spread evenly over all parts of this order.

        So they have the lengths of all rows, in the same mix, as far as this order knows lengths, and so has any run of
        them, also in one of several shards. Rows of a prefix group stay together, and so do neighbours of a file: as
        many find their prefix in the cache as in this order. Nothing is measured on probes.

        Args:
            num_shards: shards that the rows will be dealt to, in turn.
            num_last: rows at the end that stay there; none where rows are grouped.
        """
        starts, everything = self.groups, np.arange(len(self.rows))
        if self.kind == "dataset":
            block_rows = min(_BLOCK_ROWS, len(self.rows) // (_MIN_BLOCKS * num_shards)) * num_shards
            starts = everything[:: max(1, block_rows)]
        if starts is None:
            num_mixed = len(self.rows) - num_last
            positions = np.append(spread_evenly(num_mixed, num_shards), everything[num_mixed:])
        else:
            parts = np.split(everything, starts[1:])
            positions = np.concatenate([everything[:0], *(parts[at] for at in spread_evenly(len(starts)).tolist())])
        groups, weights = self._regroup(positions)
        return RowOrder(self.rows[positions], "mixed", f"(spread over {self.description})", groups, weights)

    def append(self, rows: np.ndarray) -> RowOrder:
        """Return the order with further rows at its end, each a group of its own where rows are grouped."""
        groups, weights = self.groups, self.weights
        if groups is not None and weights is not None:
            groups = np.append(groups, len(self.rows) + np.arange(len(rows)))
            weights = np.append(weights, np.full(len(rows), weights.mean()))
        lengths = None if self.lengths is None else np.append(self.lengths, np.zeros(len(rows), dtype=np.float32))
        order = dataclasses.replace(self, rows=np.append(self.rows, rows), groups=groups, weights=weights)
        return dataclasses.replace(order, lengths=lengths)

    def _regroup(self, positions: np.ndarray, num_single: int = 0) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return `groups` and `weights` of an order with the rows at these positions.

        Args:
            num_single: rows at the front that become groups of their own.
        """
        if self.groups is None or self.weights is None:
            return None, None
        sizes = np.diff(self.groups, append=len(self.rows))
        group = np.repeat(np.arange(len(sizes)), sizes)[positions]
        group[:num_single] = len(sizes) + 1 + np.arange(num_single)
        return np.flatnonzero(np.diff(group, prepend=len(sizes))), self.weights[positions]

    @property
    def description(self) -> str:
        """Return kind and reason: ``longest first by prompt length (min 1, median 20, max 300 characters)``."""
        description = f"{_ORDER_NAMES[self.kind]} {self.reason}".rstrip()
        return description if self.adapter_groups is None else f"{description}, {self.adapter_groups.description}"

    def __str__(self) -> str:
        return f"order of work: {self.description}"

    def shard(self, num_shards: int, max_rows: int, head_ends: Sequence[int] = ()) -> ShardSpec:
        """Split the rows into shards.

        Single rows go to the shards in turn, so that each shard gets its part of the first and of the last rows:
        neighbours in a file tend to be similar. Prefix groups stay whole: the heaviest group goes first, each to the
        shard with the least work. Only groups of more than half a shard are split first.

        Args:
            max_rows: the most rows of one claim.
            head_ends: ends of blocks at the front that belong to no shard; see `dpgen.scheduling.tail.heads`.
        """
        if self.groups is None or self.weights is None:
            head_starts = np.array([0, *head_ends], dtype=np.int64)
            num_rows, num_full = len(self.rows) - int(head_starts[-1]), num_shards - len(head_ends)
            sizes = [len(range(shard, num_rows, num_full)) for shard in range(num_full)]
            return ShardSpec([*(0 for _ in head_ends), *sizes], head_starts=head_starts)
        chunks = shard_groups(self.rows, self.groups, self.weights, num_shards, max_rows)
        return ShardSpec([len(chunk_starts) - 1 for _, chunk_starts in chunks], chunks)


def order_rows(config: OrderConfig, rows: InputRows, remaining: np.ndarray, text_of: PromptTextFn) -> RowOrder:
    """Return the order in which to generate rows.

    Args:
        remaining: indices of the rows to generate, int64[num_remaining], ascending.
        text_of: returns a row's prompt as text, given its index and columns, to compare and to measure. Where it
            raises, the row has no prompt.

    Raises:
        SlowRow: `text_of` raised RenderTimeout.
    """
    reads_prompts = config.work.order != "dataset" and len(remaining) > 1 and config.prompt.call_column is None
    if reads_prompts:
        order = _order_rows(config.drop_empty_hint(rows, sample_rows(remaining)), rows, remaining, text_of)
    else:
        order = _order_without_prompts(config, rows, remaining)
    if config.is_mixed:
        order = order.mix(config.num_shards)
    if not (reads_prompts and config.adapters.exceeds_slots):
        return order
    return order.sort_by_adapter(group_by_adapter(config.adapters, rows, remaining))


def _order_without_prompts(config: OrderConfig, rows: InputRows, remaining: np.ndarray) -> RowOrder:
    if config.work.order == "dataset" or len(remaining) < 2:
        return RowOrder(remaining)
    if config.work.hint_column is not None:
        return _order_by_hint(config, rows, remaining, config.work.hint_column)
    return RowOrder(remaining, reason="because a program's calls are known when it makes them")


def _order_rows(config: OrderConfig, rows: InputRows, remaining: np.ndarray, text_of: PromptTextFn) -> RowOrder:
    if config.work.order == "prefix":
        prefixes = _group_by_prefix(config, rows, remaining, text_of)
        if prefixes.num_groups == 0:
            return RowOrder(remaining, reason="because no prompts share a prefix")
        return _order_by_prefix(config, rows, remaining, prefixes)
    if config.work.order == "longest_first":
        return _order_longest_first(config, rows, remaining, text_of)
    return _choose_order(config, rows, remaining, text_of)


def order_by_measured_lengths(
    remaining: np.ndarray,
    prompt_groups: PromptGroups,
    counts: np.ndarray,
    adapter_groups: AdapterGroups | None = None,
) -> RowOrder:
    """Return the remaining rows longest first, by the measured lengths of their prompt groups.

    See `PromptGroups.sort` for rows of unmeasured groups.

    Args:
        remaining: row indices, int64[num_remaining], ascending.
        counts: `PromptGroups.count`, summed over all ranks.
        adapter_groups: keep the rows of each adapter together; None to mix them.
    """
    ordered, num_probes = prompt_groups.sort(remaining, counts)
    lengths = prompt_groups.estimate_lengths(remaining, counts)
    measured = lengths[np.isfinite(lengths)]
    if len(measured):
        detail = f"({format_range(measured, 'tokens')})"
        if num_running := int(np.isposinf(lengths).sum()):
            detail += f", after {format_count(num_running, 'row')} of prompt groups that still run their first rows"
    elif num_probes:
        detail = f"({format_count(num_probes, 'probe row')} first, one of each unmeasured prompt group)"
    else:
        detail = "(no prompt group of a remaining row is measured yet)"
    order = RowOrder(
        ordered,
        "longest_first",
        f"by measured length {detail}",
        prompt_groups=prompt_groups,
        num_probes=num_probes,
        make_tracker=lambda: prompt_groups.make_tracker(remaining, counts),
    )
    return order.sort_by_adapter(adapter_groups)


def _choose_order(config: OrderConfig, rows: InputRows, remaining: np.ndarray, text_of: PromptTextFn) -> RowOrder:
    """Return the order that a sample of the rows suggests."""
    if config.reads_only:
        order = _order_longest_first(config, rows, remaining, text_of)
        return order if config.is_mixed else _mix_lengths(order, config.num_shards)
    sample, hint = sample_rows(remaining), config.hint_column
    is_whole = len(sample) == len(remaining)
    sample_config = config if is_whole else dataclasses.replace(config, is_sample=True)
    prompts = _group_by_prefix(config, rows, sample, text_of)
    has_long_prompts = prompts.lengths.mean() >= _LONG_PROMPT_CHARS
    if hint is None and not (has_long_prompts and config.prefix_caching):
        _, num_grouped = group_by_prompt(len(rows), sample, prompts.prompt_hashes)
        if num_grouped >= sample_config.min_grouped_fraction * len(sample):
            order = _order_by_prompts(config, rows, remaining, text_of)
            if order.prompt_groups is not None:
                return order
    if config.prefix_caching and prompts.shared_fraction >= _MIN_SHARED_FRACTION:
        prefixes = prompts if is_whole else _group_by_prefix(config, rows, remaining, text_of)
        return _order_by_prefix(config, rows, remaining, prefixes)
    if hint is not None:
        hints = config.read_hints(rows, hint, sample)
        if np.isnan(hints).all():
            return RowOrder(remaining, reason=f"because column {hint} holds no number")
        if compute_tail_ratio(hints) >= _MIN_HINT_TAIL_RATIO:
            return _order_by_hint(config, rows, remaining, hint)
        return RowOrder(remaining, reason=f"because column {hint} varies too little to sort by")
    if has_long_prompts and compute_tail_ratio(prompts.lengths) >= _MIN_PROMPT_TAIL_RATIO:
        return _order_by_prompts(config, rows, remaining, text_of)
    return RowOrder(remaining, reason="because no hint predicts the rows' lengths and prompts share few prefixes")


def _mix_lengths(order: RowOrder, num_shards: int) -> RowOrder:
    """Return the rows, sorted longest first, in the order for a model that only reads them.

    Each row takes a step or two, so that no long one can outlast the others. Steps of all lengths are full of sequences
    and of tokens, where the shortest rows alone would leave steps nearly empty of tokens.
    """
    return order.mix(num_shards, min(len(order.rows) // _LAST_FRACTION, _MAX_LAST_ROWS))


def _order_longest_first(
    config: OrderConfig, rows: InputRows, remaining: np.ndarray, text_of: PromptTextFn
) -> RowOrder:
    if config.hint_column is not None:
        return _order_by_hint(config, rows, remaining, config.hint_column)
    return _order_by_prompts(config, rows, remaining, text_of)


def _order_by_hint(config: OrderConfig, rows: InputRows, remaining: np.ndarray, hint: str) -> RowOrder:
    values = config.read_hints(rows, hint, remaining)
    hints = values[~np.isnan(values)]
    # A row without a hint may be as long as the longest one.
    lengths = np.where(np.isnan(values), hints.max() if len(hints) else 0, values)
    if hint == config.work.hint_column:
        reason = f"by hint column {hint} ({format_range(hints)})"
    else:
        reason = f"by max_tokens from column {hint} ({format_range(hints, 'tokens')})"
    return _sort_by_length(
        remaining, lengths, reason, are_expected=bool(len(hints)) and lengths.min() >= 0 and not config.reads_only
    )


def _order_by_prompts(config: OrderConfig, rows: InputRows, remaining: np.ndarray, text_of: PromptTextFn) -> RowOrder:
    """Return the order by measured lengths where most rows share their prompt with others, else by prompt length."""
    if config.reads_only:
        lengths = measure_prompts(rows, remaining, select_prompt_columns(config.prompt, rows.columns), text_of)
    else:
        prompts = _group_by_prefix(config, rows, remaining, text_of)
        prompt_groups, num_grouped = group_by_prompt(len(rows), remaining, prompts.prompt_hashes)
        if num_grouped >= config.min_grouped_fraction * len(remaining):
            return order_by_measured_lengths(remaining, prompt_groups, prompt_groups.count(RankState()))
        lengths = prompts.lengths
    known = lengths[lengths > 0]
    reason = f"by prompt length ({format_range(known, 'characters')})"
    if 0 < len(known) < len(remaining):
        reason += f", {format_count(len(remaining) - len(known), 'row')} without a prompt last"
    return _sort_by_length(remaining, lengths.astype(np.float64), reason)


def _sort_by_length(remaining: np.ndarray, lengths: np.ndarray, reason: str, *, are_expected: bool = False) -> RowOrder:
    positions = np.argsort(-lengths, kind="stable")
    expected = np.minimum(lengths[positions], _MAX_EXPECTED).astype(np.float32) if are_expected else None
    return RowOrder(remaining[positions], "longest_first", reason, lengths=expected)


def _order_by_prefix(config: OrderConfig, rows: InputRows, remaining: np.ndarray, prefixes: PrefixGroups) -> RowOrder:
    positions, groups = prefixes.sort_by_group()
    tokens = np.full(len(remaining), float(_ASSUMED_OUTPUT_TOKENS))
    if config.hint_column is not None:
        values = config.read_hints(rows, config.hint_column, remaining)
        tokens = np.where(np.isnan(values), tokens, values)
    weights = tokens + prefixes.uncached_chars / _CHARS_PER_TOKEN
    reason = (
        f"({prefixes.num_grouped_rows:,} of {len(remaining):,} prompts share a prefix in "
        f"{format_count(prefixes.num_groups, 'group')}, {100 * prefixes.shared_fraction:.0f} % of all prompt text can "
        "come from the prefix cache)"
    )
    return RowOrder(remaining[positions], "prefix", reason, groups, weights[positions])


def _group_by_prefix(config: OrderConfig, rows: InputRows, row_ids: np.ndarray, text_of: PromptTextFn) -> PrefixGroups:
    columns = [*select_prompt_columns(config.prompt, rows.columns), *config.adapters.columns]
    return group_by_prefix(rows, row_ids, columns, text_of, config.adapters.find)
