"""Sum the ranks' numbers with one all-reduce: they end the run, show its progress, and start a reshard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dpgen.config.completion_checks import CHECK_NAMES
from dpgen.scheduling.tail.held_work import NO_LOAD, Load


@dataclass
class Totals:
    """Numbers of one rank, or their sums over all ranks, since the start of the attempt.

    Attributes:
        num_generated_tokens: of all rows, those still running included.
        num_cached_tokens: prompt tokens that the engines had in their prefix caches.
        num_preemptions: sequences that the engines preempted.
        num_unclaimed: rows, or chunks of rows, that no rank has claimed.
        num_reshard_requests: ranks whose engine was abandoned while they had rows.
        num_groups_measured: see `RequestSource.should_reshard`.
        num_ranks_generating: ranks with a row in the engine for too long to be rejected.
        num_ranks_without_engine: whose engine was abandoned.
        num_running_rows: rows in the engines, or whose programs run.
        num_running_seqs: sequences in the engines, those that wait there included.
        num_tried: see `LeadingErrorCheck`.
        num_calls: finished calls of rows' programs.
        num_rejected_tokens: generated tokens of samples that failed their checks.
        num_retries: samples generated again, or continued, by the check that they had failed: as in `CHECK_NAMES`.
        num_lengths_checked, num_lengths_wrong: finished rows of expected length, and those that missed it; see
            `HeldWork`.
        rates: generated tokens/s by rank; see `ThroughputMeter.get_tokens_per_s`.
        loads: what each rank holds.
    """

    num_unfinished_ranks: int = 0
    num_rows: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_unclaimed: int = 0
    num_reshard_requests: int = 0
    num_groups_measured: int = 0
    num_ranks_generating: int = 0
    num_ranks_without_engine: int = 0
    num_running_rows: int = 0
    num_running_seqs: int = 0
    num_tried: int = 0
    num_calls: int = 0
    num_rejected_tokens: int = 0
    num_retries: tuple[int, ...] = (0,) * len(CHECK_NAMES)
    num_lengths_checked: int = 0
    num_lengths_wrong: int = 0
    rates: tuple[int, ...] = ()
    loads: tuple[Load, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Return the tokens that show the run's speed: those generated, or prompts' where a model only reads."""
        return self.num_generated_tokens or self.num_prompt_tokens

    @property
    def token_unit(self) -> str:
        """Return what `num_tokens` counts: "token" or "prompt token"."""
        return "token" if self.num_generated_tokens or not self.num_prompt_tokens else "prompt token"

    def as_list(self, rank: int, num_ranks: int, rate: int, load: Load = NO_LOAD) -> list[int]:
        """Return the numbers to sum over all ranks: counts, then three for each rank, of which a rank fills its own."""
        counts = [getattr(self, field.name) for field in fields(self) if field.type == "int"]
        by_rank = [0] * (3 * num_ranks)
        by_rank[rank::num_ranks] = rate, load.time, load.slack
        return [*counts, *self.num_retries, *by_rank]

    @staticmethod
    def from_list(values: Sequence[int]) -> Totals:
        """Make totals from sums of `as_list`."""
        names = [field.name for field in fields(Totals) if field.type == "int"]
        others, num_checks = values[len(names) :], len(CHECK_NAMES)
        counts: dict[str, Any] = dict(zip(names, values, strict=False))
        by_rank = others[num_checks:]
        rates, times, slacks = (tuple(by_rank[k * len(by_rank) // 3 : (k + 1) * len(by_rank) // 3]) for k in range(3))
        loads = tuple(map(Load, times, slacks))
        return Totals(num_retries=tuple(others[:num_checks]), rates=rates, loads=loads, **counts)
