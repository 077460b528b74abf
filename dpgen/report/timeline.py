"""Make a timeline of every rank from what it wrote about itself over time.

- Each attempt of the job is drawn from its start. A rank's times count from the start of its own process, since clocks
  of different hosts are not compared; the ranks of an attempt start together.
- Attempts follow each other. The pause between two of them is shown, but takes no room.
- One rank's history is in memory at a time, and becomes a few spans.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dpgen.monitoring.status.history import Sample, read_history
from dpgen.monitoring.status.record import GENERATING
from dpgen.report.time_budget import TimeBudget

Kind = Literal["start", "generate", "tail", "idle", "end"]
KINDS: tuple[Kind, ...] = ("start", "generate", "tail", "idle", "end")
_HISTORY_NAME = re.compile(r"rank-(\d{1,9})\.history\.jsonl")
_MAX_ALIGNED_S = 15.0
_MIN_RATE_S = 0.5


@dataclass(frozen=True)
class Span:
    """Hold what a rank does from one time to another, in seconds from the start of its attempt."""

    kind: Kind
    start_s: float
    end_s: float
    label: str

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class RatePoint:
    """Hold a speed between two times, in seconds from the start of the attempt."""

    start_s: float
    end_s: float
    tokens_per_s: float
    rows_per_s: float


@dataclass
class RankTimeline:
    """Hold what one rank did in one attempt.

    Attributes:
        restarts_s: when its engine was restarted.
        state: "finished", "stopped", "failed", or "" where its history ends without a word.
        last: its newest numbers.
        rates: of the whole run, as this rank knew it.
        full_rates: its own tokens/s, in samples with rows left for all ranks.
        start_time: seconds since the epoch, by its own clock.
    """

    rank: int
    attempt: int
    spans: list[Span] = field(default_factory=list)
    restarts_s: list[float] = field(default_factory=list)
    state: str = ""
    last: Sample = field(default_factory=dict)
    rates: list[RatePoint] = field(default_factory=list)
    full_rates: list[tuple[float, int]] = field(default_factory=list)  # (tokens/s, sequences)
    start_time: float = 0.0

    @property
    def end_s(self) -> float:
        return self.spans[-1].end_s if self.spans else 0.0

    def sum_s(self, kind: Kind) -> float:
        """Return for how many seconds the rank did something."""
        return sum(span.length_s for span in self.spans if span.kind == kind)


@dataclass
class AttemptTimeline:
    """Hold one attempt of the job.

    Attributes:
        ranks: those whose history is here, by rank.
        offset_s: where it starts in the timeline of all attempts.
        pause_s: time between the end of the attempt before it and its start, by one rank's clock; None if not known.
    """

    attempt: int
    ranks: list[RankTimeline]
    offset_s: float = 0.0
    pause_s: float | None = None

    @property
    def length_s(self) -> float:
        return max((rank.end_s for rank in self.ranks), default=0.0)

    @property
    def num_generated_tokens(self) -> int:
        """Return the tokens of all ranks, also where the last words of some are not here."""
        of_run = max((_get(rank.last, "run_num_generated_tokens") for rank in self.ranks), default=0.0)
        return int(max(of_run, sum(_get(rank.last, "num_generated_tokens") for rank in self.ranks)))

    @property
    def rates(self) -> list[RatePoint]:
        """Return the speed of the whole run, as the rank with the most to say about it knows it."""
        return max((rank.rates for rank in self.ranks), key=len, default=[])


@dataclass(frozen=True)
class Timeline:
    """Hold all attempts, the oldest first.

    Attributes:
        notes: what is missing, in sentences.
    """

    attempts: list[AttemptTimeline]
    notes: list[str]

    @property
    def length_s(self) -> float:
        return sum(attempt.length_s for attempt in self.attempts)


def read_timeline(status_dir: Path, budget: TimeBudget, *, is_over: bool) -> Timeline:
    """Return the timeline of the ranks whose histories are here.

    Args:
        is_over: the newest attempt has ended, so that the last words of its ranks may be on their way.
    """
    by_attempt: dict[int, list[RankTimeline]] = defaultdict(list)
    notes, paths = [], _list_histories(status_dir)
    for number, (rank, path) in enumerate(paths):
        if budget.is_spent:
            notes.append(f"{len(paths) - number:,} of {len(paths):,} ranks' histories were not read for lack of time.")
            break
        for timeline in _split_history(rank, read_history(path)):
            by_attempt[timeline.attempt].append(timeline)
    attempts = [AttemptTimeline(attempt, ranks) for attempt, ranks in sorted(by_attempt.items())]
    if attempts and is_over:
        _complete_spans(attempts[-1])
    offset_s, before = 0.0, None
    for attempt in attempts:
        attempt.offset_s, attempt.pause_s = offset_s, _find_pause(before, attempt)
        offset_s, before = offset_s + attempt.length_s, attempt
    return Timeline(attempts, notes)


def _list_histories(status_dir: Path) -> list[tuple[int, Path]]:
    try:
        names = [path.name for path in status_dir.iterdir()]
    except OSError:
        return []
    return sorted((int(found[1]), status_dir / name) for name in names if (found := _HISTORY_NAME.fullmatch(name)))


def _split_history(rank: int, samples: Sequence[Sample]) -> Iterator[RankTimeline]:
    """Yield the rank's timeline in each attempt. A process that starts again in one begins its seconds again."""
    parts: dict[int, list[Sample]] = {}
    for sample in samples:
        attempt = sample.get("attempt")
        if isinstance(attempt, int) and _get(sample, "elapsed_s", missing=-1.0) >= 0:
            parts.setdefault(attempt, []).append(sample)
    for attempt, part in parts.items():
        yield _make_timeline(rank, attempt, sorted(part, key=lambda sample: sample["elapsed_s"]))


def _make_timeline(rank: int, attempt: int, samples: Sequence[Sample]) -> RankTimeline:
    timeline = RankTimeline(rank, attempt, last=samples[-1], state=_get_text(samples[-1], "state"))
    timeline.start_time = _get(samples[-1], "time") - _get(samples[-1], "elapsed_s")
    tail_from_s = max(
        (sample["elapsed_s"] for sample in samples if _get(sample, "run_num_unclaimed")), default=float("inf")
    )
    num_restarts, has_generated, label = 0.0, False, ""
    for sample, following in zip(samples, [*samples[1:], None], strict=True):
        start_s = float(sample["elapsed_s"])
        phase = _get_text(sample, "phase") or "unknown"
        has_generated |= phase == GENERATING
        restarts = _get(sample, "num_engine_restarts")
        if restarts > num_restarts:
            timeline.restarts_s.append(start_s)
        num_restarts = max(num_restarts, restarts)
        if following is None:
            break
        kind = _find_kind(sample, phase, tail_from_s, has_generated=has_generated)
        step = _get_text(following, "step") if following.get("is_change") else ""
        label = f"{phase}: {step}" if step and kind == "start" else phase
        _append_span(timeline.spans, Span(kind, start_s, float(following["elapsed_s"]), label))
    timeline.rates = list(_compute_rates(samples))
    timeline.full_rates = [
        (_get(sample, "tokens_per_s"), int(_get(sample, "num_running")))
        for sample in samples
        if _get(sample, "run_num_unclaimed") and _get(sample, "tokens_per_s") and _get(sample, "num_running")
    ]
    return timeline


def _find_kind(sample: Sample, phase: str, tail_from_s: float, *, has_generated: bool) -> Kind:
    if phase != GENERATING:
        return "end" if has_generated else "start"
    if sample.get("is_change") or sample["elapsed_s"] <= tail_from_s:
        return "generate"
    return "tail" if _get(sample, "num_running") + _get(sample, "num_waiting") else "idle"


def _append_span(spans: list[Span], span: Span) -> None:
    """Add a span, joined with the one before it where both are the same."""
    if spans and (spans[-1].kind, spans[-1].label) == (span.kind, span.label):
        span = Span(span.kind, spans.pop().start_s, span.end_s, span.label)
    spans.append(span)


def _compute_rates(samples: Sequence[Sample]) -> Iterator[RatePoint]:
    generating = [s for s in samples if _get_text(s, "phase") == GENERATING or _get_text(s, "state")]
    begin_s = generating[0]["elapsed_s"] if generating else 0.0
    others = (s["elapsed_s"] for s in samples if s.get("is_change") and _get_text(s, "phase") != GENERATING)
    end_s = min((elapsed_s for elapsed_s in others if elapsed_s > begin_s), default=math.inf)
    before: Sample | None = None
    for sample in generating:
        if sample.get("is_change") and before is not None:
            continue
        sample = {**sample, "elapsed_s": min(sample["elapsed_s"], end_s)}
        if before is not None and (length_s := sample["elapsed_s"] - before["elapsed_s"]) >= _MIN_RATE_S:
            num_tokens, num_rows = (
                max(0.0, _get(sample, name) - _get(before, name))
                for name in ("run_num_generated_tokens", "run_num_done")
            )
            yield RatePoint(before["elapsed_s"], sample["elapsed_s"], num_tokens / length_s, num_rows / length_s)
        elif before is not None:
            continue
        before = sample


def _complete_spans(attempt: AttemptTimeline) -> None:
    """Extend what ranks did last to the attempt's end, where that is a few seconds."""
    end_s = attempt.length_s
    for rank in attempt.ranks:
        if rank.spans and not rank.state and end_s - rank.end_s < _MAX_ALIGNED_S:
            last = rank.spans.pop()
            rank.spans.append(Span(last.kind, last.start_s, end_s, last.label))


def _find_pause(before: AttemptTimeline | None, attempt: AttemptTimeline) -> float | None:
    if before is None:
        return None
    starts = {rank.rank: rank.start_time for rank in attempt.ranks}
    for rank in before.ranks:
        if rank.rank in starts:
            return max(0.0, starts[rank.rank] - rank.start_time - rank.end_s)
    return None


def _get(sample: Sample, name: str, missing: float = 0.0) -> float:
    """Return a number; `missing` where it is left out, or no number."""
    value = sample.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number and value is not None else missing


def _get_text(sample: Mapping[str, object], name: str) -> str:
    value = sample.get(name)
    return value if isinstance(value, str) else ""
