"""Report a run at its end from the ranks' manifests: balance, stragglers, caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from dpgen.config.completion_checks import CHECK_NAMES
from dpgen.formatting import format_count, format_duration
from dpgen.monitoring.efficiency import describe_efficiency
from dpgen.records import RankManifest
from dpgen.scheduling.progress.step_times import RunEfficiency
from dpgen.scheduling.progress.throughput import UNKNOWN_RATE, find_straggler
from dpgen.scheduling.progress.totals import Totals

_MIN_REPORTED_FRACTION = 0.01  # of all prompt tokens
_MIN_BUSY_S = 10.0  # a rank that was busy for less has no meaningful rate


def balance(manifests: Sequence[RankManifest]) -> float:
    """Return the mean of the ranks' busy times over the longest: 1 if all were busy until the end."""
    times_s = [manifest.busy_s for manifest in manifests]
    return sum(times_s) / (len(times_s) * max(times_s)) if any(times_s) else 1.0


def describe_plan(attempt: int, num_rows: int, num_remaining: int, num_ranks: int) -> str:
    """Return a line on what an attempt has to do.

    Args:
        num_ranks: that generate, each with an engine of its own.
    """
    ranks = format_count(num_ranks, "rank")
    if attempt == 1:
        return f"{format_count(num_rows, 'row')} over {ranks}"
    return (
        f"attempt {attempt}: {num_rows - num_remaining:,} of {num_rows:,} rows are done, "
        f"{num_remaining:,} remain over {ranks}"
    )


def describe_generation(totals: Totals, elapsed_s: float) -> str:
    """Return ``generated 512 rows, 8,192 tokens in 12 s (683 tokens/s), 1 row failed``."""
    num_generated = totals.num_rows - totals.num_errors
    return (
        f"generated {format_count(num_generated, 'row')}, {format_count(totals.num_tokens, totals.token_unit)} "
        f"in {format_duration(elapsed_s)} ({totals.num_tokens / max(elapsed_s, 1e-9):,.0f} {totals.token_unit}s/s)"
        + (f", {format_count(totals.num_errors, 'row')} failed" if totals.num_errors else "")
    )


def summarize_run(manifests: Sequence[RankManifest], efficiency: RunEfficiency | None = None) -> Iterator[str]:
    """Yield log lines on what is worth a user's notice; none for what went as expected.

    Args:
        manifests: by rank.
        efficiency: None where it can't be told.
    """
    working = [manifest for manifest in manifests if manifest.busy_s > 0]
    if len(working) > 1:
        times_s = [manifest.busy_s for manifest in working]
        range_of_times = " to ".join(dict.fromkeys([format_duration(min(times_s)), format_duration(max(times_s))]))
        yield f"ranks were busy for {range_of_times}: balance {balance(working):.2f} (mean over longest)"
    if efficiency is not None:
        yield describe_efficiency(efficiency)
    yield from _describe_straggler(manifests)
    num_cached = sum(manifest.num_cached_tokens for manifest in manifests)
    fraction = num_cached / max(1, sum(manifest.num_prompt_tokens for manifest in manifests))
    if fraction >= _MIN_REPORTED_FRACTION:
        yield f"prefix cache: {100 * fraction:.0f} % of all prompt tokens were cached"
    yield from _describe_retries(manifests)
    num_preemptions = sum(manifest.num_preemptions for manifest in manifests)
    if num_preemptions:
        yield (
            f"KV cache: {format_count(num_preemptions, 'preemption')}, each recomputed a sequence since the cache was "
            "full. A larger KV cache or a lower engine.max_num_seqs avoids them"
        )


def format_retries(num_retries: Mapping[str, int]) -> str:
    """Return ``312 retries (regex: 300, function: 12)``; "" if there are none."""
    total = sum(num_retries.values())
    if not total:
        return ""
    by_check = ", ".join(f"{check}: {number:,}" for check, number in num_retries.items() if number)
    return f"{total:,} {'retry' if total == 1 else 'retries'} ({by_check})"


def format_fraction(part: int, whole: int) -> str:
    """Return a fraction as ``12.5 %``."""
    return f"{100 * part / max(1, whole):.1f} %"


def _describe_retries(manifests: Sequence[RankManifest]) -> Iterator[str]:
    num_retries: Counter[str] = Counter()
    for manifest in manifests:
        num_retries.update(manifest.num_retries)
    num_rejected = sum(manifest.num_rejected_tokens for manifest in manifests)
    num_tokens = num_rejected + sum(manifest.num_generated_tokens for manifest in manifests)
    if num_retries or num_rejected:
        by_check = {check: num_retries[check] for check in CHECK_NAMES}
        yield (
            f"checks: {format_retries(by_check) or 'no retries'}, {format_fraction(num_rejected, num_tokens)} of "
            "generated tokens in rejected attempts"
        )


def _describe_straggler(manifests: Sequence[RankManifest]) -> Iterator[str]:
    rates = [
        round((manifest.num_generated_tokens or manifest.num_prompt_tokens) / manifest.busy_s)
        if manifest.busy_s >= _MIN_BUSY_S
        else UNKNOWN_RATE
        for manifest in manifests
    ]
    straggler = find_straggler(rates)
    if straggler is not None:
        rank, fraction = straggler
        yield (
            f"rank {manifests[rank].rank} on {manifests[rank].node} was slow: {rates[rank]:,} tokens/s, "
            f"{100 * fraction:.0f} % of the other ranks' median"
        )
