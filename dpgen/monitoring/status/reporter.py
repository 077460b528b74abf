"""Write one rank's status file and history every few seconds, from a thread of its own.

- The main thread only stores what it does; it never waits for the disk. A disk that is full, read-only or dead costs
  status files, is reported once, and ends no run.
- Before the job has begun its attempt the rank writes a file apart (`starting-rank-N.json`), so that a start that is
  rejected leaves an earlier run's status as it is. It is removed again, and only written by starts that take longer
  than a few seconds.
- Files are written less often by many ranks: a shared file system gets about 50 a second at most.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_RESUMABLE, DpgenError, PeerFailed
from dpgen.monitoring.status.history import History, Sample
from dpgen.monitoring.status.record import (
    GENERATING,
    ProcessIdentity,
    RankCounts,
    RankRecord,
    RankState,
    RunCounts,
    identify_process,
    make_record_name,
    read_records,
    write_record,
)
from dpgen.monitoring.status.result_tally import ResultTally
from dpgen.scheduling.progress.throughput import UNKNOWN_RATE, ThroughputMeter
from dpgen.scheduling.progress.totals import Totals

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0
_MAX_FILES_PER_S = 50
_FIRST_WRITE_S = 3.0  # a start that is rejected at once leaves no file
_CLOSE_TIMEOUT_S = 2.0
_RATE_WINDOW_S = 10.0
_MAX_REASON_CHARS = 2_000
_MAX_QUEUED_PHASES = 100


class EngineCounts(Protocol):
    """Interface of an engine's statistics; see `dpgen.engine.messages.EngineStats`."""

    @property
    def num_generated_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def kv_cache_usage(self) -> float | None: ...


class EngineView(NamedTuple):
    """Hold what the thread asks about the rank's engine and its peers; each must be quick, and safe in any thread.

    Attributes:
        get_stats: returns the engine's newest statistics, since the start of the attempt; None before the first.
        get_num_restarts: returns how often the engine was restarted.
        get_wait_s: returns for how many seconds the rank has waited for other ranks; 0 if it does not wait.
        get_num_engines: returns how many engines of this rank have loaded the model.
        get_latencies: returns the counts of a `LatencyHistogram`: for how long the engine had each request.
    """

    get_stats: Callable[[], EngineCounts | None] = lambda: None
    get_num_restarts: Callable[[], int] = lambda: 0
    get_wait_s: Callable[[], float] = lambda: 0.0
    get_latencies: Callable[[], Sequence[int]] = lambda: ()
    get_num_engines: Callable[[], int] = lambda: 0


class _Phase(NamedTuple):
    name: str
    start_s: float
    time: float
    attempt: int | None
    num_done: int = 0  # rows of the whole run
    step: str = ""  # the part of the phase that has ended just now; "" where the phase begins


class RankReporter:
    """Report what one rank does, from `start` to `finish`; before `start`, every method does nothing visible.

    Attributes:
        tally: counts the rank's results.
        view: what the thread asks about the engine and the peers.
        on_write: called in the thread after each write, with the record; rank 0 shows and exports it.
        on_close: called once after the last write.
        logs_failure: True on a rank that reports a failed write; one a node is enough.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, get_time: Callable[[], float] = time.time) -> None:
        self.tally, self.view = ResultTally(), EngineView()
        self.on_write: Callable[[RankRecord], None] = lambda record: None
        self.on_close: Callable[[], None] = lambda: None
        self.logs_failure = False
        self._clock, self._get_time = clock, get_time
        self._start_s = clock()
        self._run_dir: Path | None = None
        self._rank, self._num_ranks = 0, 1
        self._attempt: int | None = None
        self._process = ProcessIdentity()
        self._phase = _Phase("starting", self._start_s, get_time(), None)
        self._new_phases: deque[_Phase] = deque([self._phase], maxlen=_MAX_QUEUED_PHASES)
        self._run: RunCounts | None = None
        self._state: RankState = "live"
        self._reason: str | None = None
        self._rate, self._run_rate = _make_meter(INTERVAL_S), _make_meter(INTERVAL_S)
        self.reads_only = False
        self._num_run_tokens = 0
        self._history: History | None = None
        self._sequence, self._has_failed, self._made_run_dir = 0, False, False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.interval_s = INTERVAL_S

    @property
    def ending(self) -> tuple[Literal["finished", "stopped", "failed"], str | None] | None:
        """Return how the attempt has ended, and why; None until then, or if none had begun."""
        if self._attempt is None or self._state == "live":
            return None
        return self._state, self._reason

    # ---- in the main thread

    def start(self, run_dir: Path, rank: int, num_ranks: int, *, has_thread: bool = True) -> None:
        """Begin to write, in a few seconds, that this rank is starting.

        Args:
            has_thread: False to write only when `write` is called.
        """
        self._run_dir, self._rank, self._num_ranks = run_dir, rank, num_ranks
        self._made_run_dir = not run_dir.exists()
        self.logs_failure = rank == 0
        self.interval_s = max(INTERVAL_S, num_ranks / _MAX_FILES_PER_S)
        self._rate, self._run_rate = _make_meter(self.interval_s), _make_meter(self.interval_s)
        self._process = identify_process()
        if has_thread:
            self._thread = threading.Thread(target=self._write_until_closed, name="status", daemon=True)
            self._thread.start()

    def begin_attempt(self, attempt: int) -> None:
        """Write from now on what the rank does in this attempt."""
        self._attempt = attempt
        self._wake.set()

    def enter_phase(self, name: str) -> None:
        """Report what the rank does from now on, in the words of `dpgen.distributed.stages.Stage`."""
        self._phase = self._make_phase(name)
        self._new_phases.append(self._phase)
        if self._attempt is not None:
            self._wake.set()

    def end_step(self, step: str) -> None:
        """Note in the history that a part of the phase has ended, e.g. "tokenizer"."""
        self._new_phases.append(self._make_phase(self._phase.name, step))

    def count_rows(self, num_rows: int, num_done: int) -> None:
        """Report the number of the run's rows, and how many of them earlier attempts have finished."""
        self._run = RunCounts(num_rows=num_rows, num_done=num_done)

    def update(self, totals: Totals, num_done: int) -> None:
        """Report the sums over all ranks.

        Args:
            num_done: rows of the run that are done, of all attempts.
        """
        assert self._run is not None, "rows are counted before any is generated"
        shared = {field.name for field in dataclasses.fields(RunCounts)} & set(vars(totals))
        counts: dict[str, Any] = {name: getattr(totals, name) for name in shared}
        # The sum shrinks when a rank is lost, until its rows are found in its journal.
        self._num_run_tokens = totals.num_prompt_tokens if self.reads_only else totals.num_generated_tokens
        counts |= {"num_rows": self._run.num_rows, "num_done": max(num_done, self._run.num_done)}
        self._run = RunCounts(**counts)

    def finish(self, error: BaseException | None = None) -> None:
        """Write how the rank ended, and end the thread; wait for two seconds at most.

        Args:
            error: what ended it; None if the run is complete.
        """
        if self._run_dir is None or self._closing.is_set():
            return
        if error is not None:
            is_resumable = isinstance(error, KeyboardInterrupt) or getattr(error, "exit_status", 1) == EXIT_RESUMABLE
            self._state = "stopped" if is_resumable else "failed"
            text = (
                str(error) if isinstance(error, DpgenError) else f"{type(error).__name__}: {error}".removesuffix(": ")
            )
            self._reason = None if type(error) is PeerFailed else redact_text(text)[:_MAX_REASON_CHARS]
        else:
            self._state = "finished"
            self.enter_phase("finished")
        self._closing.set()
        self._wake.set()
        if self._thread is None:
            self.write()
        else:
            self._thread.join(_CLOSE_TIMEOUT_S)
        self.on_close()

    def _make_phase(self, name: str, step: str = "") -> _Phase:
        num_done = 0 if self._run is None else self._run.num_done
        return _Phase(name, self._clock(), self._get_time(), self._attempt, num_done, step)

    # ---- in the thread

    def _write_until_closed(self) -> None:
        next_s = self._start_s + _FIRST_WRITE_S
        while not self._closing.is_set():
            self._wake.wait(max(0.0, next_s - self._clock()))
            self._wake.clear()
            if not self._closing.is_set():
                self.write()
                next_s = self._clock() + self.interval_s
                self._closing.wait(self.interval_s / 4)  # phases that follow each other quickly share a write
        self.write()

    def write(self) -> None:
        """Write the rank's files once; the thread's boundary: nothing that fails here reaches the run."""
        try:
            if self._attempt is None and self._closing.is_set():
                self._remove_traces()
                return
            record = self._make_record()
            self._write_files(record)
            self.on_write(record)
        except Exception as error:  # noqa: BLE001 - a foreign file system or exporter
            self._report_failure(error)

    def _make_record(self) -> RankRecord:
        phase, now_s = self._phase, self._clock()
        self._sequence += 1
        return RankRecord(
            rank=self._rank,
            num_ranks=self._num_ranks,
            attempt=self._attempt,
            process=self._process,
            sequence=self._sequence,
            time=round(self._get_time(), 3),
            elapsed_s=round(now_s - self._start_s, 3),
            interval_s=self.interval_s,
            state=self._state,
            reason=self._reason,
            phase=phase.name,
            phase_s=round(now_s - phase.start_s, 3),
            wait_s=round(self.view.get_wait_s(), 1),
            counts=self._count(phase, now_s),
            errors=self.tally.list_errors(),
            run=self._add_rate(now_s),
            latencies=tuple(self.view.get_latencies()),
        )

    def _count(self, phase: _Phase, now_s: float) -> RankCounts:
        tally, stats = self.tally.counts, self.view.get_stats()
        counts: dict[str, Any] = {"num_engine_restarts": self.view.get_num_restarts()}
        if stats is not None:
            counts["num_generated_tokens"] = max(tally.num_generated_tokens, stats.num_generated_tokens)
            counts["num_cached_tokens"], counts["num_preemptions"] = stats.num_cached_tokens, stats.num_preemptions
            self._rate.record(now_s, stats.num_computed_tokens if self.reads_only else counts["num_generated_tokens"])
        if stats is not None and phase.name == GENERATING and self._state == "live":
            counts |= {"num_running": stats.num_running, "num_waiting": stats.num_waiting}
            counts["num_engines"] = self.view.get_num_engines()
            counts |= {"kv_cache_usage": stats.kv_cache_usage, "tokens_per_s": _read_rate(self._rate, now_s)}
        return dataclasses.replace(tally, **counts)

    def _add_rate(self, now_s: float) -> RunCounts | None:
        run = self._run
        if run is None or self._phase.name != GENERATING or self._state != "live":
            return run
        self._run_rate.record(now_s, self._num_run_tokens)
        return dataclasses.replace(run, tokens_per_s=_read_rate(self._run_rate, now_s))

    def _write_files(self, record: RankRecord) -> None:
        assert self._run_dir is not None
        directory = self._run_dir / "status"
        # A directory that a user removes comes back, but the run's own only while none has begun in it.
        directory.mkdir(parents=record.attempt is None, exist_ok=True)
        write_record(directory, record)
        if record.attempt is None:
            return
        if self._history is None:
            self._history = History(directory / f"rank-{self._rank}.history.jsonl")
            (directory / make_record_name(self._rank, has_begun=False)).unlink(missing_ok=True)
        self._append_history(self._history, record)

    def _append_history(self, history: History, record: RankRecord) -> None:
        samples: list[Sample] = []
        while self._new_phases:
            phase = self._new_phases.popleft()
            place = {"attempt": phase.attempt or record.attempt, "time": round(phase.time, 3)}
            elapsed_s = round(phase.start_s - self._start_s, 3)
            change = {"phase": phase.name, "step": phase.step or None, "is_change": True}
            samples.append({**place, "elapsed_s": elapsed_s, **change, "run_num_done": phase.num_done})
        elapsed_s = record.elapsed_s
        if history.is_due(elapsed_s) or record.state != "live":
            run = {} if record.run is None else {f"run_{name}": value for name, value in vars(record.run).items()}
            counts = vars(record.counts)
            place = {"attempt": record.attempt, "time": record.time, "elapsed_s": elapsed_s}
            end = {} if record.state == "live" else {"state": record.state}
            samples.append({**place, "phase": record.phase, **end, "wait_s": record.wait_s, **counts, **run})
        history.append(samples)

    def _remove_traces(self) -> None:
        """Remove what a start that began no attempt has written; directories only while they are empty."""
        assert self._run_dir is not None
        directory = self._run_dir / "status"
        with suppress(OSError):
            (directory / make_record_name(self._rank, has_begun=False)).unlink(missing_ok=True)
        if self._made_run_dir and self._sequence:
            with suppress(OSError):
                directory.rmdir()
                self._run_dir.rmdir()

    def _report_failure(self, error: Exception) -> None:
        if self._has_failed or self._attempt is None or not self.logs_failure:
            return
        self._has_failed = True
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        logger.warning(
            f"{self._run_dir}/status can't be written: {reason}. 'dpgen status' shows nothing newer, and the run "
            "continues"
        )


class PeerReader:
    """Read on rank 0 what all ranks have written, for lines about each of them; an `on_write` of a reporter.

    Attributes:
        records: the newest records of this attempt, by rank; only of ranks whose files this one can see.
    """

    def __init__(self, run_dir: Path) -> None:
        self._directory = run_dir / "status"
        self.records: dict[int, RankRecord] = {}

    def __call__(self, own: RankRecord) -> None:
        records = read_records(self._directory)
        self.records = {record.rank: record for record in records if record.attempt == own.attempt}


def _make_meter(interval_s: float) -> ThroughputMeter:
    return ThroughputMeter(max(_RATE_WINDOW_S, 3 * interval_s), min_window_s=min(1.0, interval_s))


def _read_rate(meter: ThroughputMeter, now_s: float) -> int | None:
    rate = meter.get_tokens_per_s(now_s)
    return None if rate == UNKNOWN_RATE else rate
