"""Format the status of a run for people: the whole in a few lines, then a line for each rank.

All text that a run brings along (error messages, reasons, host names) is escaped: it may hold control characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dpgen.formatting import escape_text, format_count, format_duration
from dpgen.monitoring.status.record import RankCounts, RankRecord
from dpgen.monitoring.status.run_status import RankView, RunState, RunStatus
from dpgen.monitoring.time_left import TimeLeft
from dpgen.scheduling.progress.throughput import UNKNOWN_RATE

_HEADLINES: Mapping[RunState, str] = {
    "starting": "starting",
    "live": "live",
    "finished": "finished",
    "stopped": "stopped; rerun the same command to resume",
    "failed": "failed",
    "dead": "dead: its ranks ended without a word; rerun the same command to resume",
    "checking": "checking whether its ranks live: those of other hosts are watched for a few seconds",
    "unknown": "unknown",
}
_MAX_LISTED_RANKS = 5
_MAX_ERROR_TYPES = 8
_HEADER = ("rank", "host", "state", "phase", "rows", "tokens/s", "run/wait", "KV", "cached", "preempted", "restarts")
_LEFT = ("host", "state", "phase")


def format_run(status: RunStatus) -> Iterator[str]:
    """Yield the lines on the whole run."""
    attempt = "" if status.attempt is None else f", attempt {status.attempt}"
    yield f"{escape_text(status.run_dir)}: {_HEADLINES[status.state]}{attempt}"
    if status.reason:
        yield f"  reason    {escape_text(status.reason)}"
    if status.num_done is not None:
        yield f"  rows      {_format_rows(status)}"
    if status.tokens_per_s is not None:
        rows = "" if status.rows_per_s is None else f", {status.rows_per_s:,.1f} rows/s"
        yield f"  speed     {status.tokens_per_s:,} tokens/s{rows}"
    if status.state == "live":
        yield f"  time left {format_time_left(status.time_left)}"
    if status.waits_for:
        yield f"  waits for {_format_awaited(status.waits_for)}"
    for slow in status.stragglers[:_MAX_LISTED_RANKS]:
        yield (
            f"  slow      rank {slow.rank} on {escape_text(slow.host)}: {slow.tokens_per_s:,} tokens/s, "
            f"{100 * slow.fraction:.0f} % of the other ranks' median"
        )
    if engine := list(_format_engines(status)):
        yield f"  engines   {', '.join(engine)}"
    for kind in status.errors[:_MAX_ERROR_TYPES]:
        example = f", e.g. row {kind.row}: {escape_text(kind.message)}" if kind.message else ""
        yield f"  errors    {escape_text(kind.type)}: {format_count(kind.num_rows, 'row')}{example}"
    if len(status.errors) > _MAX_ERROR_TYPES:
        yield f"  errors    and {len(status.errors) - _MAX_ERROR_TYPES} types more"
    yield from (f"  note      {escape_text(note)}" for note in status.notes)


def format_ranks(ranks: Sequence[RankView]) -> Iterator[str]:
    """Yield a table with a line for each rank, below a header."""
    rows = [_HEADER, *(_make_row(view) for view in ranks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        cells = zip(_HEADER, row, widths, strict=True)
        yield "  ".join(
            cell.ljust(width) if name in _LEFT else cell.rjust(width) for name, cell, width in cells
        ).rstrip()


def format_time_left(time_left: TimeLeft | None) -> str:
    """Return ``42 min 10 s (38 min 02 s to 47 min 30 s)``."""
    if time_left is None:
        return "unknown"
    low, expected, high = map(format_duration, (time_left.low_s, time_left.expected_s, time_left.high_s))
    return f"{expected} ({low} to {high})" if low != high else expected


def format_rank_lines(records: Mapping[int, RankRecord], rates: Sequence[int]) -> Iterator[str]:
    """Yield a line for each rank while a run goes.

    Args:
        records: what ranks have written, where this one can see it.
        rates: tokens/s by rank, of all ranks; `UNKNOWN_RATE` for none.
    """
    for rank in sorted({*range(len(rates)), *records}):
        record = records.get(rank)
        rate = rates[rank] if rank < len(rates) and rates[rank] != UNKNOWN_RATE else None
        if record is not None and record.counts.tokens_per_s is not None:
            rate = record.counts.tokens_per_s
        speed = "no rate yet" if rate is None else f"{rate:,} tokens/s"
        if record is None:
            yield f"rank {rank}: {speed}"
            continue
        counts, host = record.counts, escape_text(record.process.host)
        parts = [record.phase, format_count(counts.num_rows, "row"), speed, f"{counts.num_running:,} running"]
        parts += [f"{counts.num_waiting:,} waiting"]
        if counts.kv_cache_usage is not None:
            parts.append(f"KV {100 * counts.kv_cache_usage:.0f} %")
        if counts.num_errors:
            parts.append(format_count(counts.num_errors, "error"))
        if counts.num_engines > 1:
            parts.append(format_count(counts.num_engines, "engine"))
        if counts.num_engine_restarts:
            parts.append(format_count(counts.num_engine_restarts, "restart"))
        yield f"rank {rank} on {host}: {', '.join(parts)}"


def _format_rows(status: RunStatus) -> str:
    total = "an unknown number of" if status.num_rows is None else f"{status.num_rows:,}"
    percent = f" ({100 * (status.num_done or 0) / status.num_rows:.0f} %)" if status.num_rows else ""
    errors = f", {status.num_errors:,} with an error" if status.num_errors else ""
    is_whole = status.state in ("finished", "unknown") or status.attempt in (None, 1)
    scope = "" if is_whole or not errors else " in this attempt"
    return f"{status.num_done:,} of {total} done{percent}{errors}{scope}"


def _format_engines(status: RunStatus) -> Iterator[str]:
    if any(view.counts.num_engines > 1 for view in status.ranks):
        yield f"{status.num_engines} on {format_count(len(status.ranks), 'rank')}"
    if status.num_calls:
        yield format_count(status.num_calls, "call")
    if status.prefix_cache_fraction:
        yield f"{100 * status.prefix_cache_fraction:.0f} % of prompt tokens cached"
    if status.num_preemptions:
        yield format_count(status.num_preemptions, "preemption")
    if status.num_engine_restarts:
        yield format_count(status.num_engine_restarts, "restart")


def _format_awaited(views: Sequence[RankView]) -> str:
    listed = []
    for view in views[:_MAX_LISTED_RANKS]:
        if view.state == "missing":
            listed.append(f"rank {view.rank} (not there yet)")
        else:
            running = view.counts.num_running + view.counts.num_waiting
            what = f"{format_count(running, 'sequence')} left" if running else format_duration(view.phase_s)
            listed.append(f"rank {view.rank} on {escape_text(view.host)} ({escape_text(view.phase)}, {what})")
    more = f" and {len(views) - _MAX_LISTED_RANKS:,} more" if len(views) > _MAX_LISTED_RANKS else ""
    return ", ".join(listed) + more


def _make_row(view: RankView) -> tuple[str, ...]:
    if view.state == "missing":
        return str(view.rank), "-", "missing", *[""] * 8
    counts = view.counts
    lasts = "" if view.state == "finished" else f" {format_duration(view.phase_s)}"
    phase = f"{escape_text(view.phase)}{lasts}"
    return str(view.rank), escape_text(view.host), view.state, phase, *_format_counts(counts)


def _format_counts(counts: RankCounts) -> tuple[str, ...]:
    cached = f"{100 * counts.num_cached_tokens / counts.num_prompt_tokens:.0f} %" if counts.num_prompt_tokens else "-"
    return (
        f"{counts.num_rows:,}",
        "-" if counts.tokens_per_s is None else f"{counts.tokens_per_s:,}",
        f"{counts.num_running}/{counts.num_waiting}",
        "-" if counts.kv_cache_usage is None else f"{100 * counts.kv_cache_usage:.0f} %",
        cached,
        f"{counts.num_preemptions:,}",
        f"{counts.num_engine_restarts:,}",
    )
