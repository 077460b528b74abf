"""Put the status of a whole run together from what its ranks have written.

- Only files are read, so any host that sees the run directory can ask. It sees the ranks of other nodes only where they
  share the directory, but the run's sums are in every rank's file.
- The newest attempt counts. Files of ranks that only an earlier, larger world had are ignored.
- A run of which no rank lives is finished if it has its result, else failed, stopped, or dead, as the ranks ended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE
from dpgen.journal.reader import index_journal
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import get_num_rows
from dpgen.monitoring.status.history import Sample, read_history
from dpgen.monitoring.status.liveness import LivenessJudge
from dpgen.monitoring.status.record import GENERATING, ErrorKind, RankCounts, RankRecord, read_records
from dpgen.monitoring.time_left import TimeLeft, estimate_time_left
from dpgen.scheduling.progress.throughput import UNKNOWN_RATE, find_stragglers

RunState = Literal["starting", "live", "finished", "stopped", "failed", "dead", "checking", "unknown"]
ViewState = Literal["live", "finished", "stopped", "failed", "dead", "checking", "missing"]

EXIT_STATUSES: Mapping[RunState, int] = {
    "starting": EXIT_OK,
    "live": EXIT_OK,
    "checking": EXIT_OK,
    "finished": EXIT_OK,
    "stopped": EXIT_RESUMABLE,
    "failed": EXIT_FAILED,
    "dead": EXIT_FAILED,
    "unknown": EXIT_FAILED,
}
_WAITS_AFTER_S = 5.0  # shorter waits of ranks for each other are part of every phase


@dataclass(frozen=True)
class RankView:
    """Show one rank.

    Attributes:
        state: "missing" if the rank has written nothing in this attempt: it has not started yet, or its files are on
            another node. "checking" until it is known whether it lives.
    """

    rank: int
    host: str
    state: ViewState
    phase: str = ""
    phase_s: float = 0.0
    pid: int = 0
    reason: str | None = None
    counts: RankCounts = field(default_factory=RankCounts)


@dataclass(frozen=True)
class SlowRank:
    """Name a straggler, with its rate as a fraction of the other ranks' median."""

    rank: int
    host: str
    tokens_per_s: int
    fraction: float


@dataclass(frozen=True)
class RunStatus:
    """Hold the status of a run; `dpgen status --json` prints its fields under these names.

    Attributes:
        version: grows when a field is removed or changes its meaning; fields may be added at any time.
        exit_status: of `dpgen status`.
        reason: why the run ended; None while it goes on, or if no rank could say.
        attempt: None if none has begun.
        num_ranks: of the attempt; 0 if not known.
        num_rows, num_done: of the whole run; None if not known yet.
        num_errors, errors, num_generated_tokens, num_preemptions, num_engine_restarts: of this attempt; of a finished
            run's result, as far as that says.
        num_calls: finished calls of rows' programs, of this attempt.
        num_engines: of all ranks that are live, such as have loaded the model.
        tokens_per_s, rows_per_s, time_left: None while they are not known.
        prefix_cache_fraction: of all prompt tokens of finished rows, how many were cached; None if not known.
        waits_for: the ranks that others wait for, or that hold the last rows.
        stragglers: the slowest first.
        notes: what a person should know about the above, in sentences.
    """

    run_dir: str
    state: RunState
    exit_status: int
    reason: str | None = None
    attempt: int | None = None
    num_ranks: int = 0
    num_rows: int | None = None
    num_done: int | None = None
    num_errors: int | None = None
    num_generated_tokens: int | None = None
    tokens_per_s: int | None = None
    rows_per_s: float | None = None
    time_left: TimeLeft | None = None
    prefix_cache_fraction: float | None = None
    num_preemptions: int = 0
    num_engine_restarts: int = 0
    num_calls: int = 0
    num_engines: int = 0
    errors: tuple[ErrorKind, ...] = ()
    waits_for: tuple[RankView, ...] = ()
    stragglers: tuple[SlowRank, ...] = ()
    ranks: tuple[RankView, ...] = ()
    notes: tuple[str, ...] = ()
    version: int = 1


class RunWatcher:
    """Read the status of one run, as often as asked."""

    def __init__(self, run_dir: Path, judge: LivenessJudge | None = None) -> None:
        self._run_dir = RunDir(str(run_dir))
        self._judge = judge or LivenessJudge()

    @property
    def has_run(self) -> bool:
        """Return True if the directory holds a run, or the beginning of one."""
        run_dir = self._run_dir
        return (run_dir.path / "run.json").exists() or run_dir.journal.is_dir() or bool(read_records(run_dir.status))

    def read(self) -> RunStatus:
        """Return the status now; "checking" where another look is needed to tell a live run from a dead one.

        Raises:
            DpgenError: run.json, or the journal where it is needed, can't be read.
        """
        run_dir = self._run_dir
        metadata, records = run_dir.read_metadata(), read_records(run_dir.status)
        recorded = metadata.get("attempt")
        attempts = [record.attempt for record in records if record.attempt is not None]
        attempt = max([*attempts, recorded if isinstance(recorded, int) else 0])
        begun = [record for record in records if record.attempt == attempt and attempt]
        starting = [record for record in records if record.attempt is None]
        views = [self._view(record) for record in begun]
        starting_views = [self._view(record) for record in starting]
        is_live = any(view.state in ("live", "checking") for view in views)
        if not is_live and any(view.state in ("live", "checking") for view in starting_views):
            live = [(v, r) for v, r in zip(starting_views, starting, strict=True) if v.state in ("live", "checking")]
            return self._describe_start([view for view, _ in live], [record for _, record in live], attempt)
        if not begun and not attempt and starting:
            ranks = tuple(_add_missing(starting_views, max(record.num_ranks for record in starting)))
            notes = ("its ranks died while they were starting, before an attempt began",)
            return self._make("dead", num_ranks=len(ranks), ranks=ranks, notes=notes)
        if not begun:
            return self._describe_without_records(metadata, attempt)
        return self._describe(views, begun, attempt)

    def _view(self, record: RankRecord) -> RankView:
        state: ViewState = self._judge.judge(record) if record.state == "live" else record.state
        process = record.process
        place = {"phase": record.phase, "phase_s": record.phase_s, "pid": process.pid, "reason": record.reason}
        return RankView(record.rank, process.host, state, counts=record.counts, **place)  # type: ignore[arg-type]

    def _describe_start(self, views: list[RankView], records: list[RankRecord], attempt: int) -> RunStatus:
        num_ranks = max(record.num_ranks for record in records)
        waits_for = _find_awaited(views, records, num_ranks)
        state: RunState = "checking" if all(view.state == "checking" for view in views) else "starting"
        notes = ["no attempt has begun yet" if not attempt else f"attempt {attempt} has ended, the next is starting"]
        ranks = tuple(_add_missing(views, num_ranks))
        return self._make(
            state, attempt=attempt or None, num_ranks=num_ranks, waits_for=waits_for, ranks=ranks, notes=tuple(notes)
        )

    def _describe_without_records(self, metadata: Mapping[str, object], attempt: int) -> RunStatus:
        """Return what the journal says, of a run of an older version, or one that could not write its status."""
        if self._run_dir.is_finished:
            return self._describe_result(self._make("finished", attempt=attempt or None))
        index = index_journal(self._run_dir.journal)
        note = "no rank of this attempt has written a status here: it may be live, or not; the counts are the journal's"
        return self._make(
            "unknown",
            attempt=attempt or None,
            num_rows=get_num_rows(metadata),
            num_done=len(index),
            num_errors=int(index.error.sum()),
            notes=(note,),
        )

    def _describe(self, views: list[RankView], records: list[RankRecord], attempt: int) -> RunStatus:
        num_ranks = max(record.num_ranks for record in records)
        state, reason = _find_state(views, records, is_finished=self._run_dir.is_finished)
        runs = [record.run for record in records if record.run is not None]
        run = max(runs, key=lambda run: (run.num_done, run.num_generated_tokens), default=None)
        live = [
            (view, record) for view, record in zip(views, records, strict=True) if view.state in ("live", "checking")
        ]
        is_live = state in ("live", "starting", "checking")
        status = self._make(
            state,
            reason=None if is_live else reason,
            attempt=attempt,
            num_ranks=num_ranks,
            ranks=tuple(_add_missing(views, num_ranks)),
            errors=_merge_errors(records),
            num_engine_restarts=sum(record.counts.num_engine_restarts for record in records),
            num_engines=sum(record.counts.num_engines for _, record in live),
            notes=tuple(_find_notes(views, num_ranks, is_live=is_live)),
            waits_for=_find_awaited([v for v, _ in live], [r for _, r in live], num_ranks) if is_live else (),
            stragglers=_find_slow_ranks([r for _, r in live]) if is_live else (),
        )
        if run is None:
            return status
        rates = [record.run.tokens_per_s for _, record in live if record.run and record.run.tokens_per_s is not None]
        samples = self._read_progress(records[0]) if is_live else []
        fields: dict[str, Any] = {
            "num_rows": run.num_rows,
            "num_done": run.num_done,
            "num_errors": run.num_errors,
            "num_generated_tokens": run.num_generated_tokens,
            "num_preemptions": run.num_preemptions,
            "num_calls": run.num_calls,
            "prefix_cache_fraction": run.num_cached_tokens / run.num_prompt_tokens if run.num_prompt_tokens else None,
            "tokens_per_s": round(median(rates)) if rates and is_live else None,
            "rows_per_s": _compute_row_rate(samples),
            "time_left": estimate_time_left(samples, run.num_rows - run.num_done) if is_live else None,
        }
        status = replace(status, **fields)
        return self._describe_result(status) if state == "finished" else status

    def _read_progress(self, record: RankRecord) -> list[tuple[float, int]]:
        """Return (seconds, rows done) since generating began, as one rank knows the sums over all."""
        history = read_history(self._run_dir.status / f"rank-{record.rank}.history.jsonl")
        samples = select_progress(history, record.attempt)
        if samples and record.phase == GENERATING and record.run is not None and record.elapsed_s > samples[-1][0]:
            samples.append((record.elapsed_s, record.run.num_done))
        return samples

    def _describe_result(self, status: RunStatus) -> RunStatus:
        """Return the status with the counts of the finished result, which are of all attempts."""
        success = self._run_dir.read_success()
        num_rows, errors = success.get("num_rows"), success.get("errors")
        if not isinstance(num_rows, int) or not isinstance(errors, Mapping):
            return status
        examples = {kind.type: kind for kind in status.errors}
        kinds = [
            ErrorKind(type, number, *((examples[type].row, examples[type].message) if type in examples else (-1, "")))
            for type, number in errors.items()
            if isinstance(number, int)
        ]
        return replace(
            status,
            num_rows=num_rows,
            num_done=num_rows,
            num_errors=success.get("num_errors", status.num_errors),
            num_generated_tokens=success.get("num_generated_tokens", status.num_generated_tokens),
            errors=tuple(sorted(kinds, key=lambda kind: -kind.num_rows)),
        )

    def _make(self, state: RunState, **fields: object) -> RunStatus:
        return RunStatus(str(self._run_dir.path), state, EXIT_STATUSES[state], **fields)  # type: ignore[arg-type]


def select_progress(samples: Sequence[Sample], attempt: int | None) -> list[tuple[float, int]]:
    """Return (seconds, rows done) at each sample of an attempt since it last began to generate."""
    selected: list[tuple[float, int]] = []
    for sample in samples:
        if sample.get("attempt") != attempt or sample.get("step"):
            continue
        if sample.get("is_change"):
            selected.clear()
        if sample.get("phase") == GENERATING:
            selected.append((float(sample.get("elapsed_s", 0)), int(sample.get("run_num_done", 0))))
    return selected


def watch_until_known(watcher: RunWatcher, sleep: Callable[[float], None], poll_s: float = 0.5) -> RunStatus:
    """Return the status once it is known of each rank whether it lives; takes seconds where other hosts run them."""
    while True:
        status = watcher.read()
        if all(view.state != "checking" for view in status.ranks):
            return status
        sleep(poll_s)


def _compute_row_rate(samples: Sequence[tuple[float, int]]) -> float | None:
    if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
        return None
    return round((samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0]), 3)


def _find_state(
    views: Sequence[RankView], records: Sequence[RankRecord], *, is_finished: bool
) -> tuple[RunState, str | None]:
    """Return the run's state, and why it ended: the reason of the lowest rank that did not only follow another."""
    states = [view.state for view in views]
    by_state = {state: [view.reason for view in views if view.state == state and view.reason] for state in states}
    if "live" in states:
        has_generated = any(r.phase == GENERATING or r.counts.num_rows for r in records)
        return ("live" if has_generated else "starting"), None
    if "checking" in states:
        return "checking", None
    if "failed" in states:
        return "failed", next(iter(by_state["failed"]), None)
    if is_finished:
        return "finished", None
    if "stopped" in states:
        return "stopped", next(iter(by_state["stopped"]), None)
    return "dead", None


def _find_notes(views: Sequence[RankView], num_ranks: int, *, is_live: bool) -> list[str]:
    notes = []
    dead = [f"rank {view.rank} on {view.host} (pid {view.pid}, {view.phase})" for view in views if view.state == "dead"]
    if dead:
        more = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
        notes.append(f"died without a word: {', '.join(dead[:5])}{more}")
    num_missing = num_ranks - len(views)
    if num_missing > 0 and not is_live:
        notes.append(f"{num_missing} of {num_ranks} ranks have no file here: they wrote elsewhere, or never began")
    return notes


def _add_missing(views: Sequence[RankView], num_ranks: int) -> list[RankView]:
    by_rank = {view.rank: view for view in views}
    return [by_rank.get(rank) or RankView(rank, "", "missing") for rank in sorted({*range(num_ranks), *by_rank})]


def _find_awaited(views: Sequence[RankView], records: Sequence[RankRecord], num_ranks: int) -> tuple[RankView, ...]:
    """Return the ranks that keep others waiting: those that do not wait while others do, and those not there yet.

    Towards the end of generating, when some ranks have no rows left, those that still run some.
    """
    waiting = {record.rank for record in records if record.wait_s > _WAITS_AFTER_S and record.phase != GENERATING}
    seen = {view.rank for view in views}
    missing = [RankView(rank, "", "missing") for rank in range(num_ranks) if rank not in seen]
    is_joining = any(record.attempt is None for record in records)
    if waiting or is_joining:
        busy = [view for view in views if view.rank not in waiting] if waiting else []
        return (*busy, *(missing if is_joining else []))
    if all(record.phase == GENERATING for record in records):
        running = {r.rank for r in records if r.counts.num_running + r.counts.num_waiting}
        if running and len(running) < len(records) and all(r.run and not r.run.num_unclaimed for r in records):
            return tuple(view for view in views if view.rank in running)
    return ()


def _find_slow_ranks(records: Sequence[RankRecord]) -> tuple[SlowRank, ...]:
    """Return the stragglers; none once all rows are claimed, when rates no longer show how fast engines are."""
    if not all(record.run is not None and record.run.num_unclaimed for record in records):
        return ()
    rates = [r.counts.tokens_per_s if r.counts.tokens_per_s is not None else UNKNOWN_RATE for r in records]
    return tuple(
        SlowRank(records[place].rank, records[place].process.host, rates[place], round(fraction, 3))
        for place, fraction in find_stragglers(rates)
    )


def _merge_errors(records: Sequence[RankRecord]) -> tuple[ErrorKind, ...]:
    """Return the errors of all ranks by type, the most frequent first, each with the example of the lowest row."""
    by_type: dict[str, list[ErrorKind]] = defaultdict(list)
    for record in records:
        for kind in record.errors:
            by_type[kind.type].append(kind)
    merged = []
    for type, kinds in by_type.items():
        first = min(kinds, key=lambda kind: kind.row)
        merged.append(ErrorKind(type, sum(kind.num_rows for kind in kinds), first.row, first.message))
    return tuple(sorted(merged, key=lambda kind: -kind.num_rows))
