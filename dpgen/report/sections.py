"""Prepare the parts of the page: which numbers, which marks, in which words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dpgen.formatting import escape_text, format_duration
from dpgen.report import charts
from dpgen.report.facts import ReportFacts
from dpgen.report.numbers import format_number, format_percent, format_seconds
from dpgen.report.spending import PURPOSES, Purpose
from dpgen.report.timeline import AttemptTimeline, Span, Timeline

_MAX_LANES = 24
_MAX_LISTED_RANKS = 64
_MAX_ERROR_TYPES = 30

_PURPOSE_TEXTS: Mapping[Purpose, str] = {
    "generate": "generating what is in the result",
    "rejected": "generating what checks rejected",
    "lost": "generated again after deaths or interruptions",
    "tail": "tail: no rows left to claim, batches not full",
    "idle": "idle: waiting for other ranks",
    "start": "start-up",
    "end": "gathering and writing",
}


@dataclass(frozen=True)
class Tile:
    """Hold one of the numbers on top of the page."""

    name: str
    value: str
    detail: str = ""
    is_bad: bool = False


@dataclass(frozen=True)
class LaneView:
    """Hold a rank's timeline as it is drawn."""

    rank: int
    chart: Markup


def list_tiles(facts: ReportFacts) -> list[Tile]:
    """Return the numbers on top: what a person asks first."""
    journal, timeline = facts.journal, facts.timeline
    num_rows = facts.num_rows
    of = "of an unknown number" if num_rows is None else f"of {num_rows:,} rows"
    of += f", {format_percent(journal.num_done / num_rows)}" if num_rows else ""
    tiles = [Tile("rows done", f"{journal.num_done:,}", of)]
    share = f"{format_percent(journal.num_errors / journal.num_done)} of them" if journal.num_errors else "none"
    tiles.append(Tile("rows with an error", f"{journal.num_errors:,}", share, is_bad=journal.num_errors > 0))
    tokens = facts.num_generated_tokens
    per_row = f"{format_number(tokens / max(1, journal.num_done - journal.num_errors))} a row"
    if tokens or not (facts.metadata.get("identity") or {}).get("pooling"):
        tiles.append(Tile("generated tokens", format_number(tokens), per_row if tokens else ""))
    if speed := _compute_mean_speed(timeline):
        tiles.append(Tile("tokens/s", format_number(speed), "mean while generating, all ranks"))
    if timeline.length_s:
        attempts = len(timeline.attempts)
        tiles.append(
            Tile("duration", format_duration(timeline.length_s), f"in {attempts} attempts" if attempts > 1 else "")
        )
    if facts.spending is not None:
        hours = facts.spending.total_s / 3600
        text = f"{hours:,.1f}" if hours >= 9.95 else f"{hours:.2f}"
        tiles.append(Tile(f"{facts.spending.unit}-hours", text, "of all attempts"))
    if facts.efficiency is not None:
        tiles.append(Tile("efficiency", format_percent(facts.efficiency.fraction), "of the engines' bound"))
    status = facts.status
    if status is not None and status.prefix_cache_fraction is not None:
        tiles.append(Tile("prefix hits", format_percent(status.prefix_cache_fraction), "of prompt tokens cached"))
    return tiles


def _compute_mean_speed(timeline: Timeline) -> float:
    points = [point for attempt in timeline.attempts for point in attempt.rates]
    seconds = sum(point.end_s - point.start_s for point in points)
    return sum(point.tokens_per_s * (point.end_s - point.start_s) for point in points) / seconds if seconds else 0.0


def describe_throughput(facts: ReportFacts) -> Markup | None:
    """Return the chart of tokens/s over time; None where no history tells."""
    timeline = facts.timeline
    points = [
        (attempt.offset_s + point.start_s, attempt.offset_s + point.end_s, point.tokens_per_s)
        for attempt in timeline.attempts
        for point in attempt.rates
    ]
    if not points:
        return None
    return charts.draw_curve(
        points,
        timeline.length_s,
        list_attempt_marks(timeline),
        (make_axis_format(timeline.length_s), lambda value: f"{format_number(value)} tokens/s"),
        "generated tokens per second over time, all ranks",
    )


def list_attempt_marks(timeline: Timeline) -> list[tuple[float, str]]:
    """Return where attempts after the first begin, with their number and the pause before them."""
    marks = []
    for attempt in timeline.attempts[1:]:
        pause = f" after {format_duration(attempt.pause_s)}" if attempt.pause_s else ""
        marks.append((attempt.offset_s, f"attempt {attempt.attempt}{pause}"))
    return marks


def make_axis_format(length_s: float) -> Callable[[float], str]:
    """Return what formats times on an axis: all in one unit, with few digits."""
    units = ((86_400 * 3, 86_400.0, "d"), (3_600 * 3, 3_600.0, "h"), (60 * 3, 60.0, "min"), (0, 1.0, "s"))
    unit_s, unit = next((unit_s, unit) for limit_s, unit_s, unit in units if length_s >= limit_s)
    digits = 0 if length_s >= 20 * unit_s else 1
    return lambda seconds: f"{seconds / unit_s:.{digits if seconds else 0}f} {unit}"


def describe_timeline(facts: ReportFacts) -> dict[str, Any] | None:
    """Return the lanes of ranks, and of all ranks together where there are too many to show each."""
    timeline = facts.timeline
    if not timeline.length_s:
        return None
    by_rank = charts.count_lanes(timeline)
    ranks = list(by_rank)
    if len(ranks) > _MAX_LANES:

        def compute_generating_s(rank: int) -> float:
            return sum(lane.sum_s("generate") for lane in by_rank[rank])

        ranks = sorted(sorted(ranks, key=compute_generating_s)[:_MAX_LANES])
    return {
        "lanes": [LaneView(rank, charts.draw_lane(timeline, rank, _describe_span)) for rank in ranks],
        "num_ranks": len(by_rank),
        "summary": charts.draw_all_ranks(timeline) if len(by_rank) > len(ranks) else None,
        "axis": charts.draw_time_axis(timeline.length_s, make_axis_format(timeline.length_s)),
        "num_restarts": sum(len(lane.restarts_s) for lanes in by_rank.values() for lane in lanes),
        "marks": [text for _, text in list_attempt_marks(timeline)][:20],
    }


def _describe_span(attempt: AttemptTimeline, span: Span) -> str:
    what = {"tail": "tail", "idle": "idle, waiting for other ranks"}.get(span.kind, escape_text(span.label[:80]))
    return f"{what}: {format_seconds(span.length_s)}, attempt {attempt.attempt}, from {format_seconds(span.start_s)}"


def describe_spending(facts: ReportFacts) -> dict[str, Any] | None:
    """Return the bar of where time went, with its legend."""
    spending = facts.spending
    if spending is None or not spending.total_s:
        return None
    parts = [(purpose, spending.seconds[purpose]) for purpose in PURPOSES if spending.seconds[purpose] > 0]
    legend = [
        {
            "class": f"k-{purpose}",
            "text": _PURPOSE_TEXTS[purpose],
            "share": format_percent(seconds / spending.total_s),
            "time": format_seconds(seconds),
        }
        for purpose, seconds in parts
    ]
    bar = charts.draw_shares(
        (
            (f"k-{purpose}", s / spending.total_s, f"{_PURPOSE_TEXTS[purpose]}: {format_seconds(s)}")
            for purpose, s in parts
        ),
        f"where the {spending.unit}-seconds went",
    )
    return {"bar": bar, "legend": legend, "unit": spending.unit, "total": format_seconds(spending.total_s)}


def describe_errors(facts: ReportFacts) -> list[dict[str, Any]]:
    """Return errors by type, the most frequent first; exact numbers where the finished run has them."""
    exact = facts.success.get("errors")
    numbers = {name: number for name, (number, _) in facts.journal.errors.items()}
    if isinstance(exact, Mapping) and facts.state == "finished":
        numbers |= {str(name): number for name, number in exact.items() if isinstance(number, int)}
    total = max(1, sum(numbers.values()))
    ordered = sorted(numbers.items(), key=lambda item: -item[1])[:_MAX_ERROR_TYPES]
    return [
        {
            "type": name,
            "number": number,
            "share": number / total,
            "examples": facts.journal.errors.get(name, (0, []))[1],
        }
        for name, number in ordered
    ]


def describe_rows(facts: ReportFacts) -> list[dict[str, Any]]:
    """Return a few rows to look at, by row."""
    rows = []
    for result in sorted(facts.journal.statistics.rows, key=lambda result: result.row):
        answers = [
            {
                "text": completion.text or completion.parsed or "",
                "reasoning": completion.reasoning or "",
                "tools": [f"{call.name}({call.arguments})" for call in completion.tool_calls],
                "finish_reason": completion.finish_reason or "none",
                "num_tokens": completion.num_tokens,
            }
            for completion in result.completions[:3]
        ]
        rows.append(
            {
                "row": result.row,
                "prompt": facts.prompts.get(result.row, ""),
                "num_prompt_tokens": result.num_prompt_tokens,
                "answers": answers,
                "num_more": max(0, len(result.completions) - len(answers)),
            }
        )
    return rows


def list_ranks(facts: ReportFacts) -> dict[str, Any]:
    """Return a table of ranks with their numbers in the newest attempt; of many, those with the fewest rows."""
    views: Sequence[Any] = [view for view in facts.status.ranks if view.state != "missing"] if facts.status else []
    shown = views
    if len(views) > _MAX_LISTED_RANKS:
        shown = sorted(sorted(views, key=lambda view: view.counts.num_rows)[:_MAX_LISTED_RANKS], key=lambda v: v.rank)
    return {"shown": shown, "total": len(views)}
