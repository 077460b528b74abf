"""What every rank tells rank 0 at the end, and what that says of the run: balance, slow ranks, caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpgen.formatting import format_duration
from dpgen.scheduling.throughput import UNKNOWN_RATE, find_straggler

_MIN_REPORTED_FRACTION = 0.01  # of all prompt tokens
_MIN_BUSY_S = 10.0  # below that a rank's rate says little of it


@dataclass(frozen=True)
class RankManifest:
    """A rank's part of an attempt.

    Attributes:
        sees_rank_0: whether its run folder is rank 0's.
        num_rows, num_bytes: rows in its journal, and their bytes.
        num_prompt_tokens, num_generated_tokens: of those rows.
        num_cached_tokens: prompt tokens that its engine had in its prefix cache.
        num_preemptions: sequences that its engine set back for want of KV blocks.
        busy_s: seconds from the first row given to its engine to the last one finished.
    """

    rank: int
    node: str
    sees_rank_0: bool = True
    num_rows: int = 0
    num_bytes: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    busy_s: float = 0.0


def balance(manifests: Sequence[RankManifest]) -> float:
    """The mean of the ranks' busy times over the longest: 1 where all were busy to the end."""
    times_s = [each.busy_s for each in manifests]
    return sum(times_s) / (len(times_s) * max(times_s)) if any(times_s) else 1.0


def summarize_run(manifests: Sequence[RankManifest]) -> Iterator[str]:
    """What is worth a line for people after a run; by rank."""
    working = [each for each in manifests if each.busy_s > 0]
    if len(working) > 1:
        times = dict.fromkeys(format_duration(pick(each.busy_s for each in working)) for pick in (min, max))
        yield f"ranks were busy for {' to '.join(times)}: balance {balance(working):.2f} (mean over longest)"
    rates = [round(m.num_generated_tokens / m.busy_s) if m.busy_s >= _MIN_BUSY_S else UNKNOWN_RATE for m in manifests]
    slow = find_straggler(rates)
    if slow is not None:
        rank, share = slow
        yield (
            f"rank {manifests[rank].rank} on {manifests[rank].node} was slow: {rates[rank]:,} tokens/s, "
            f"{100 * share:.0f} % of the others' median"
        )
    num_cached = sum(each.num_cached_tokens for each in manifests)
    share = num_cached / max(1, sum(each.num_prompt_tokens for each in manifests))
    if share >= _MIN_REPORTED_FRACTION:
        yield f"prefix cache: {100 * share:.0f} % of the prompts' tokens were there already"
    num_preemptions = sum(each.num_preemptions for each in manifests)
    if num_preemptions:
        yield (
            f"KV cache: {num_preemptions:,} times a sequence was set back and computed again for want of room; more "
            "memory for it, or a lower engine.max_num_seqs, would save that"
        )
