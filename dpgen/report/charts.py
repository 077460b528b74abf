"""Draw the report's charts as SVG: no script, no style attribute (the page's policy forbids both), colours by class.

- Horizontal places are percentages, so a chart fills any width while its text keeps its size. Curves, which SVG takes
  in no percentages, stretch in a box of their own.
- Each mark has a `<title>`, which browsers show when it is pointed at, and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from dpgen.report.timeline import KINDS, AttemptTimeline, RankTimeline, Span, Timeline

_PLOT_HEIGHT, _TOP, _BOTTOM = 190, 14, 24  # pixels
_MAX_POINTS = 400
_MAX_SPANS_PER_LANE = 80
_MIN_VISIBLE_FRACTION = 0.0008
_SUMMARY_BINS = 160


@dataclass(frozen=True)
class Bar:
    """Hold a bar of a histogram: where it begins and ends as fractions of the width, its number, and its text."""

    start: float
    end: float
    number: float
    text: str


def tag(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """Return an element; texts are escaped, `class_` is class, and other underscores are hyphens."""
    names = {"class_": "class", "viewBox": "viewBox", "preserveAspectRatio": "preserveAspectRatio"}
    written = "".join(
        f' {names.get(key, key.replace("_", "-"))}="{escape(value)}"' for key, value in attributes.items()
    )
    body = Markup("").join(children)
    return Markup(f"<{name}{written}>{body}</{name}>")


def draw_curve(
    points: Sequence[tuple[float, float, float]],
    length: float,
    marks: Sequence[tuple[float, str]],
    formats: tuple[Callable[[float], str], Callable[[float], str]],
    label: str,
) -> Markup:
    """Return a chart of steps over a filled area.

    Args:
        points: (from, to, value) along the x axis, ascending; what lies between two is 0.
        length: of the x axis.
        marks: places of vertical lines, with their text.
        formats: of values on the x axis and on the y axis.
        label: says what is shown, for those who can't see it.
    """
    format_x, format_y = formats
    points = _merge_points(points)
    top = _round_up(max((value for _, _, value in points), default=0.0))
    line, area, end = [], [], None
    for start, stop, value in points:
        x0, x1, y = (1000 * start / length, 1000 * stop / length, 100 - 100 * value / top)
        begins = end is None or start > end + 1e-9
        if begins and end is not None:
            area.append(f"V100 M{x0:.1f} 100")
        elif begins:
            area.append(f"M{x0:.1f} 100")
        area.append(f"V{y:.2f} H{x1:.1f}")
        line.append(f"{'M' + format(x0, '.1f') + ' ' + format(y, '.2f') if begins else f'V{y:.2f}'} H{x1:.1f}")
        end = stop
    curve = tag(
        "svg",
        tag("path", class_="area", d=" ".join([*area, "V100 Z"])),
        tag("path", class_="line", d=" ".join(line)),
        *(
            tag("rect", tag("title", f"{format_x(start)} to {format_x(stop)}: {format_y(value)}"), class_="hit",
                x=f"{1000 * start / length:.1f}", y=0, width=f"{1000 * (stop - start) / length:.1f}", height=100)
            for start, stop, value in points
        ),
        x=0, y=_TOP, width="100%", height=_PLOT_HEIGHT - _TOP - _BOTTOM,
        viewBox="0 0 1000 100", preserveAspectRatio="none",
    )  # fmt: skip
    content = [*_draw_y_axis(top, format_y), curve, *_draw_x_axis(length, format_x), *_draw_marks(marks, length)]
    return tag("svg", *content, class_="plot", width="100%", height=_PLOT_HEIGHT, role="img", aria_label=label)


def draw_histogram(
    bars: Sequence[Bar], ticks: Sequence[tuple[float, str]], label: str, marks: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Return a histogram.

    Args:
        ticks, marks: texts below it, and lines in it, by their fraction of the width.
    """
    top = max((bar.number for bar in bars), default=0.0) or 1.0
    height = _PLOT_HEIGHT - _TOP - _BOTTOM
    content = [tag("line", class_="grid", x1="0%", x2="100%", y1=_TOP + height, y2=_TOP + height)]
    for bar in bars:
        if bar.number:
            bar_height = max(1.0, height * bar.number / top)
            content.append(
                tag("rect", tag("title", bar.text), class_="bar", x=f"{100 * bar.start:.2f}%",
                    y=f"{_TOP + height - bar_height:.1f}", width=f"{100 * (bar.end - bar.start) * 0.94:.2f}%",
                    height=f"{bar_height:.1f}")
            )  # fmt: skip
    content += _draw_marks(marks, 1.0)
    content += [_draw_tick(place, text) for place, text in ticks]
    return tag("svg", *content, class_="plot", width="100%", height=_PLOT_HEIGHT, role="img", aria_label=label)


def draw_shares(parts: Iterable[tuple[str, float, str]], label: str) -> Markup:
    """Return one bar of several parts: (class, fraction, text)."""
    content, start = [], 0.0
    for name, fraction, text in parts:
        if fraction > 0:
            content.append(_draw_block(name, start, start + fraction, text, 28))
        start += fraction
    return tag("svg", *content, class_="shares", width="100%", height=28, role="img", aria_label=label)


def draw_lane(timeline: Timeline, rank: int, describe: Callable[[AttemptTimeline, Span], str]) -> Markup:
    """Return the timeline of one rank over all attempts.

    Args:
        describe: returns the text of a span.
    """
    length_s, height = timeline.length_s or 1.0, 16
    content: list[Markup] = []
    own = [(attempt, lane) for attempt in timeline.attempts for lane in attempt.ranks if lane.rank == rank]
    is_crowded = sum(len(lane.spans) for _, lane in own) > _MAX_SPANS_PER_LANE
    for attempt, lane in own:
        for span in _join_kinds(lane.spans) if is_crowded else lane.spans:
            start, end = (attempt.offset_s + span.start_s) / length_s, (attempt.offset_s + span.end_s) / length_s
            if end - start >= _MIN_VISIBLE_FRACTION:
                content.append(_draw_block(f"k-{span.kind}", start, end, describe(attempt, span), height))
        for restart_s in lane.restarts_s[:_MAX_SPANS_PER_LANE]:
            x = f"{100 * (attempt.offset_s + restart_s) / length_s:.2f}%"
            content.append(tag("circle", tag("title", "its engine was restarted"), class_="restart", cx=x, cy=8, r=4))
    content += _draw_breaks(timeline, height)
    return tag("svg", *content, class_="lane", width="100%", height=height, role="img", aria_label=f"rank {rank}")


def draw_all_ranks(timeline: Timeline) -> Markup:
    """Return which part of all ranks did what over time, stacked."""
    length_s, bins = timeline.length_s or 1.0, np.zeros((len(KINDS), _SUMMARY_BINS))
    for attempt in timeline.attempts:
        for lane in attempt.ranks:
            for span in lane.spans:
                _add_span(bins[KINDS.index(span.kind)], attempt.offset_s + span.start_s, span.length_s, length_s)
    sums = bins.sum(axis=0)
    shares = np.divide(bins, max(1e-9, float(sums.max(initial=0.0)))) * 100
    below, paths = np.zeros(_SUMMARY_BINS), []
    for kind, share in zip(KINDS, shares, strict=True):
        above = below + share
        forth = " ".join(f"L{x} {100 - y:.1f} L{x + 1} {100 - y:.1f}" for x, y in enumerate(above.tolist()))
        back = " ".join(
            f"L{x + 1} {100 - y:.1f} L{x} {100 - y:.1f}" for x, y in reversed(list(enumerate(below.tolist())))
        )
        paths.append(tag("path", class_=f"k-{kind}", d=f"M0 {100 - below[0]:.1f} {forth} {back} Z"))
        below = above
    return tag("svg", *paths, class_="lane", width="100%", height=72, viewBox=f"0 0 {_SUMMARY_BINS} 100",
               preserveAspectRatio="none", role="img", aria_label="all ranks")  # fmt: skip


def draw_time_axis(length_s: float, format_x: Callable[[float], str]) -> Markup:
    """Return the axis below a timeline's lanes."""
    ticks = [_draw_tick(x / 4, format_x(length_s * x / 4), y=14) for x in range(5)]
    return tag("svg", *ticks, class_="axis", width="100%", height=20, aria_hidden="true")


def _draw_block(name: str, start: float, end: float, text: str, height: float) -> Markup:
    return tag("rect", tag("title", text), class_=name, x=f"{100 * start:.3f}%", y=0,
               width=f"{100 * (end - start):.3f}%", height=height)  # fmt: skip


def _draw_breaks(timeline: Timeline, height: float) -> list[Markup]:
    places = [attempt.offset_s / (timeline.length_s or 1.0) for attempt in timeline.attempts[1:]]
    return [
        tag("line", class_="break", x1=f"{100 * x:.2f}%", x2=f"{100 * x:.2f}%", y1=0, y2=height) for x in places[:200]
    ]


def _draw_y_axis(top: float, format_y: Callable[[float], str]) -> list[Markup]:
    height, drawn = _PLOT_HEIGHT - _TOP - _BOTTOM, []
    for fraction in (0.0, 0.5, 1.0):
        y = _TOP + height * (1 - fraction)
        drawn.append(tag("line", class_="grid", x1="0%", x2="100%", y1=y, y2=y))
        if fraction:
            drawn.append(tag("text", format_y(top * fraction), class_="tick", x=0, y=y - 3))
    return drawn


def _draw_x_axis(length: float, format_x: Callable[[float], str]) -> list[Markup]:
    return [_draw_tick(x / 4, format_x(length * x / 4)) for x in range(5)]


def _draw_tick(place: float, text: str, y: float = _PLOT_HEIGHT - 7) -> Markup:
    anchor = "start" if place <= 0.04 else "end" if place >= 0.96 else "middle"
    return tag("text", text, class_="tick", x=f"{100 * place:.2f}%", y=y, text_anchor=anchor)


def _draw_marks(marks: Sequence[tuple[float, str]], length: float) -> list[Markup]:
    drawn = []
    for place, text in marks[:50]:
        x = f"{100 * place / length:.2f}%"
        anchor = "end" if place / length > 0.7 else "start"
        drawn.append(tag("line", class_="mark", x1=x, x2=x, y1=_TOP, y2=_PLOT_HEIGHT - _BOTTOM))
        drawn.append(tag("text", text, class_="tick", x=x, y=_TOP - 3, text_anchor=anchor))
    return drawn


def _merge_points(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Return points at most `_MAX_POINTS` of them; neighbours are joined with their mean."""
    size = math.ceil(len(points) / _MAX_POINTS) or 1
    merged = []
    for first in range(0, len(points), size):
        part = points[first : first + size]
        weight = sum(stop - start for start, stop, _ in part) or 1.0
        mean = sum((stop - start) * value for start, stop, value in part) / weight
        merged.append((part[0][0], part[-1][1], mean))
    return merged


def _join_kinds(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].kind == span.kind:
            span = Span(span.kind, joined.pop().start_s, span.end_s, span.kind)
        joined.append(span)
    return joined


def _add_span(row: np.ndarray, start_s: float, length_s: float, total_s: float) -> None:
    """Add a span's seconds to the bins that it covers."""
    first, last = (len(row) * x / total_s for x in (start_s, start_s + length_s))
    for bin in range(int(first), min(len(row), math.ceil(last))):
        row[bin] += min(last, bin + 1) - max(first, bin)


def _round_up(value: float) -> float:
    """Return a number of one or two digits that is not smaller: the top of an axis."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if unit * step >= value * 0.9999)


def count_lanes(timeline: Timeline) -> dict[int, list[RankTimeline]]:
    """Return the timelines of each rank in all attempts, by rank."""
    lanes: dict[int, list[RankTimeline]] = {}
    for attempt in timeline.attempts:
        for lane in attempt.ranks:
            lanes.setdefault(lane.rank, []).append(lane)
    return dict(sorted(lanes.items()))
