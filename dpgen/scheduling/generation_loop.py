"""Run the generation loop of one rank: admit, collect, sync totals, check, until no rank has unfinished work.

- Nothing in the loop waits while the engine could work. The engine always holds a few more rows than it runs, requests
  are built between its messages, the journal syncs in a thread, and totals are summed by an asynchronous all-reduce.
- A row in flight stays with its rank until its result is recorded, or until a reshard after the engine was abandoned.
- Decisions that concern all ranks (end, reshard, abort) follow from totals, which are the same on every rank.
- What the engine has finished is recorded before the loop ends, also when it is interrupted or a peer fails.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpgen.distributed.group import PendingReduce, RankGroup
from dpgen.engine.messages import EngineStats, RowsFinished
from dpgen.errors import Interrupted, PeerFailed
from dpgen.formatting import format_count
from dpgen.records import RankManifest, Request, RowResult, UndecodedRow
from dpgen.scheduling.admission import AdmissionController
from dpgen.scheduling.groups.prompt_groups import RankState
from dpgen.scheduling.interfaces import Engine, Planner, ResultSink
from dpgen.scheduling.progress.leading_errors import LeadingErrorCheck
from dpgen.scheduling.progress.step_times import RankSpeed, StepMeter, summarize_lengths
from dpgen.scheduling.progress.throughput import ThroughputMeter, compute_slowdowns
from dpgen.scheduling.progress.totals import Totals
from dpgen.scheduling.request_source import RequestSource

logger = logging.getLogger(__name__)

_SYNC_INTERVAL_S = 1.0
_STALE_SYNC_S = 5.0  # a sync that is this late is too old to leave rows to other ranks
_REJECTION_WINDOW_S = 0.5  # an engine returns a row that it rejects within this time
_WAIT_S = 0.1  # the longest wait for an engine that has work
# Requests are built ahead for so long before the engine's events are looked for again, which costs as much as building
# one. The engine has rows that wait, and does not notice.
_BUILD_S = 0.001
_DRAIN_S = 5.0  # the longest wait for rows that are being parsed when the loop ends early
# Results that may be between engine and journal before no more rows are admitted.
_MIN_PENDING, _PENDING_PER_SEQ = 64, 2
_IDLE_WAIT_S = 0.01  # the longest wait for one that has none, while other ranks or this rank's workers do
# While the engine has work, workers are asked for what they parse, check or prepare only so often, or once so many
# results are with them: each time costs as much as several results do, and nothing waits for them.
_WORKER_INTERVAL_S, _WORKER_BATCH = 0.04, 16


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a `GenerationLoop`.

    Attributes:
        reserve_rows: sequences kept waiting in the engine beyond those that it runs.
        num_samples: sequences of a row that does not give a number of its own.
        rate_window_s: over how many seconds this rank's rate is measured, for the totals.
        max_leading_errors: stop if this many rows are finished and all are errors; see `LeadingErrorCheck`.
        reads_only: True if the model only reads prompts: the tokens read show how fast an engine is.
    """

    reserve_rows: int = 32
    num_samples: int = 1
    max_leading_errors: int = 0
    reads_only: bool = False
    rate_window_s: float = 10.0


class GenerationLoop:
    """Generate one rank's rows, in step with all other ranks.

    Args:
        planner: makes another source of requests after an engine or a rank was lost, or lengths were measured.
        engine: a loaded engine.
        results: records every result.
        group: the ranks.
        stop_reason: returns why the run must stop now; None to continue.

    Attributes:
        engine_stats: the engine's newest statistics, since the start of the attempt; None before the first.
        latencies: for how long the engine had each request.
    """

    def __init__(
        self,
        planner: Planner,
        engine: Engine,
        results: ResultSink,
        group: RankGroup,
        config: LoopConfig,
        stop_reason: Callable[[], str | None],
    ) -> None:
        self._planner, self._engine, self._results, self._group = planner, engine, results, group
        self._leading_errors, self._stop_reason = LeadingErrorCheck(config.max_leading_errors), stop_reason
        self._admission = AdmissionController(config.reserve_rows, config.num_samples, reads_only=config.reads_only)
        self._reads_only = config.reads_only
        self.latencies = self._admission.latencies
        self._throughput, self._steps = ThroughputMeter(config.rate_window_s), StepMeter()
        self.engine_stats: EngineStats | None = None
        self._source: RequestSource
        self._on_progress: Callable[[Totals], None]
        # Rows, and the tokens of each: twelve bytes a row, where a dictionary would take a hundred.
        self._finished_rows, self._kept_tokens = array("q"), array("i")
        self._num_kept_tokens = self._most_seqs = 0
        self._local = Totals()
        self._global: Totals | None = None
        self._pending_sync: PendingReduce | None = None
        self._next_sync_s = self._next_recorded_s = self._last_finished_s = 0.0
        self._first_admitted_s: float | None = None

    def run(self, source: RequestSource, on_progress: Callable[[Totals], None] = lambda totals: None) -> Totals:
        """Generate until no rank has unfinished work, and return the totals of all ranks. Collective.

        Call it again with a new plan's source after ranks were lost; see `get_state`.

        Args:
            source: this rank's requests.
            on_progress: called with the totals of all ranks about once a second, plus the rows of lost ranks.

        Raises:
            Interrupted: there is a reason to stop; finished rows are recorded.
            NoEngineLeft: every rank's engine was abandoned.
            PeerFailed: another rank failed, or was lost.
            DpgenError: the first rows all failed, or a result could not be recorded.
        """
        self._source, self._on_progress = source, on_progress
        self._global = self._pending_sync = None
        self._leading_errors.drop_trial()  # a lost rank may have had some of its rows
        try:
            while self._global is None or self._global.num_unfinished_ranks > 0:
                self._group.heartbeat()
                self._admit()
                self._collect()
                self._count_recorded()
                self._sync_totals()
                self._check()
        except (Interrupted, PeerFailed):
            self._drain_finished()
            raise
        finally:
            self._source.close()
        return self._global

    def get_state(self) -> RankState:
        """Return the rows that this rank has finished or runs; those of an abandoned engine return to the plan."""
        for result in self._results.take_recorded():  # `_count_recorded` may have put them off
            self._count(result)
        attempts = self._results.drop_retries() if self._engine.is_abandoned else []
        if self._engine.is_abandoned:
            self._admission.clear()
        running = dict.fromkeys([*self._admission, *self._results.pending_rows])
        return RankState(
            np.array(self._finished_rows, dtype=np.int64),
            np.array(self._kept_tokens, dtype=np.int64),
            np.array(list(running), dtype=np.int64),
            tuple(attempts),
        )

    def fill_manifest(self, manifest: RankManifest) -> RankManifest:
        """Return a copy of the manifest with this rank's numbers filled in."""
        busy_s = 0.0 if self._first_admitted_s is None else self._last_finished_s - self._first_admitted_s
        return dataclasses.replace(
            manifest,
            num_prompt_tokens=self._local.num_prompt_tokens,
            num_generated_tokens=self._num_kept_tokens,
            num_cached_tokens=self._local.num_cached_tokens,
            num_preemptions=self._local.num_preemptions,
            num_retries=dict(self._results.retry_counts.num_retries),
            num_rejected_tokens=self._results.retry_counts.num_rejected_tokens,
            busy_s=round(max(0.0, busy_s), 3),
        )

    def measure_speed(self) -> RankSpeed:
        """Return what this rank's engine took for its steps, and how long its rows got."""
        lengths, counts = summarize_lengths(np.array(self._kept_tokens, dtype=np.int64))
        return RankSpeed(self._steps.samples, lengths, counts, self._most_seqs)

    @property
    def _has_work(self) -> bool:
        return self._needs_engine or self._results.has_pending

    @property
    def _needs_engine(self) -> bool:
        return len(self._admission) > 0 or self._results.has_retries or not self._source.is_exhausted

    # ---- admit

    def _admit(self) -> None:
        # If what follows the engine is slower than the engine, finished rows must not fill the memory.
        if self._results.num_processing > max(_MIN_PENDING, _PENDING_PER_SEQ * self._engine.max_num_seqs):
            return
        now = time.monotonic()
        self._admission.scale_limit(getattr(self._engine, "num_caches", 1))
        requests, rejected = self._admission.admit(
            self._source, self._engine.max_num_seqs, now, self._take_next, lambda: self._results.num_begun
        )
        for result in rejected:
            self._results.add(result)
        if requests:
            self._first_admitted_s = self._first_admitted_s or now
            self._engine.submit(requests)

    def _take_next(self) -> Request | RowResult | None:
        """Return the next request: of a row that has begun, or else of a new one."""
        if (retry := self._results.take_retry()) is not None:
            return retry
        while self._results.can_begin and self._admission.offer(self._source, self._results.num_begun):
            request = self._source.next_request()
            if not isinstance(request, Request):
                return request
            if begun := self._results.begin(request):
                return begun
        return None

    # ---- collect

    def _collect(self) -> None:
        """Take the engine's events, and record finished rows; build a request ahead while there are none."""
        events = self._engine.poll(0)
        if not events and not self._engine.is_abandoned and self._prepare():
            return
        finished = []
        for event in events or self._engine.poll(self._max_wait_s):
            if isinstance(event, RowsFinished):
                self._last_finished_s = time.monotonic()
                self._admission.release(event.ids, self._last_finished_s)
                finished.append(event)
            elif isinstance(event, EngineStats):
                self._apply_engine_stats(event)
        try:
            self._admit()  # before recording: the engine must not wait for text and journal
        finally:  # also if the store is lost while rows are claimed
            for event in finished:
                self._record_all(event)

    def _prepare(self) -> bool:
        """Build requests ahead of their admission, for a moment; return False if there is none to build."""
        self._source.poll()
        until_s, num_built = time.monotonic() + _BUILD_S, 0
        while self._results.prepare() or (self._source.should_prefetch and self._source.prefetch()):
            num_built += 1
            if time.monotonic() >= until_s:
                break
        return num_built > 0

    @property
    def _max_wait_s(self) -> float:
        """Seconds to wait for the engine at most."""
        num_with_workers = self._source.num_preparing + self._results.num_preparing + self._results.num_processing
        if not self._needs_engine or (num_with_workers and not self._admission):
            return _IDLE_WAIT_S
        return _WORKER_INTERVAL_S if num_with_workers else _WAIT_S

    def _apply_engine_stats(self, stats: EngineStats) -> None:
        now, self.engine_stats = time.monotonic(), stats
        self._most_seqs = max(self._most_seqs, self._engine.max_num_seqs)  # an engine may be lost at the end
        num_tokens_before = self._local.num_generated_tokens
        self._local.num_generated_tokens = max(stats.num_generated_tokens, self._num_kept_tokens)
        self._local.num_cached_tokens = stats.num_cached_tokens
        num_before, self._local.num_preemptions = self._local.num_preemptions, stats.num_preemptions
        self._steps.record(now, self._local.num_generated_tokens, stats.num_running, stats.elapsed_s)
        if stats.num_running:
            self._source.advance((self._local.num_generated_tokens - num_tokens_before) / stats.num_running)
        if self._admission:
            num_tokens = stats.num_computed_tokens if self._reads_only else self._local.num_generated_tokens
            self._throughput.record(now, num_tokens)
        came_down = self._admission.update_limit(
            stats.num_running, stats.num_preemptions, self._engine.max_num_seqs, now
        )
        if came_down:
            logger.warning(
                f"the KV cache is short: {format_count(stats.num_preemptions - num_before, 'sequence')} preempted "
                f"within about 1 s, now running at most {format_count(self._admission.seq_limit or 0, 'sequence')}"
            )

    def _record_all(self, finished: RowsFinished) -> None:
        results: list[RowResult | UndecodedRow] = [*finished.results, *finished.undecoded]
        for result in results:
            self._results.add(result)

    def _count_recorded(self) -> None:
        now = time.monotonic()
        if 0 < self._results.num_processing < _WORKER_BATCH and now < self._next_recorded_s and self._admission:
            return
        self._next_recorded_s = now + _WORKER_INTERVAL_S
        for result in self._results.take_recorded():
            self._count(result)

    def _count(self, result: RowResult) -> None:
        self._source.release(result.row, result.num_generated_tokens if result.error is None else None)
        if result.error is None:
            self._source.record_finished(result.row)
        self._finished_rows.append(result.row)
        self._kept_tokens.append(result.num_generated_tokens)
        self._local.num_rows += 1
        self._local.num_prompt_tokens += result.num_prompt_tokens or 0
        self._num_kept_tokens += result.num_generated_tokens
        self._local.num_generated_tokens = max(self._local.num_generated_tokens, self._num_kept_tokens)
        self._local.num_errors += result.error is not None
        self._leading_errors.record(result)

    def _drain_finished(self) -> None:
        """Record what the engine has finished by now, so that a resumed run need not generate these rows again."""
        for event in self._engine.poll(0):
            if isinstance(event, RowsFinished):
                self._admission.release(event.ids)
                self._record_all(event)
        deadline_s = time.monotonic() + _DRAIN_S
        self._count_recorded()
        while self._results.num_processing and time.monotonic() < deadline_s:
            time.sleep(_IDLE_WAIT_S)
            self._count_recorded()

    # ---- sync totals

    def _sync_totals(self) -> None:
        """Start the all-reduce of totals when it is due, and apply its result when it is there; never wait."""
        now = time.monotonic()
        if self._pending_sync is None:
            # An idle rank starts the next all-reduce immediately, so the run ends as soon as the last rank reports no
            # work.
            if self._has_work and now < self._next_sync_s:
                return
            self._pending_sync = self._start_sync(now)
        if not self._pending_sync.done():
            if now > self._next_sync_s + _STALE_SYNC_S:
                self._source.stop_yielding()
            return
        totals = Totals.from_list(self._pending_sync.result())
        self._pending_sync = None
        self._apply_totals(totals)

    def _start_sync(self, now: float) -> PendingReduce:
        self._next_sync_s = now + _SYNC_INTERVAL_S
        if not self._has_work:
            self._throughput.reset()
        rate = self._throughput.get_tokens_per_s(now)
        values = self._collect_local_totals().as_list(self._group.rank, self._group.size, rate, self._source.load)
        return self._group.all_reduce_async(values, "sum")

    def _collect_local_totals(self) -> Totals:
        is_stranded = self._engine.is_abandoned and self._needs_engine
        self._local.num_reshard_requests = int(is_stranded)
        self._local.num_groups_measured = self._source.num_groups_measured
        self._local.num_unfinished_ranks = int(self._has_work)
        self._local.num_ranks_without_engine = int(self._engine.is_abandoned)
        self._local.num_running_rows = self._results.num_begun or len(self._admission)
        self._local.num_running_seqs = self._admission.num_seqs
        self._local.num_unclaimed = self._source.refresh_own_remaining()
        # The engine returns a rejected row immediately. A row that stays is being generated, and may succeed.
        oldest_s = self._admission.oldest_admitted_s
        is_generating = oldest_s is not None and time.monotonic() - oldest_s > _REJECTION_WINDOW_S
        self._local.num_ranks_generating = int(is_generating)
        self._local.num_tried = self._leading_errors.num_tried
        self._local.num_calls = self._results.num_calls
        counts = self._results.retry_counts
        self._local.num_rejected_tokens = counts.num_rejected_tokens
        self._local.num_retries = counts.by_check
        self._local.num_lengths_checked, self._local.num_lengths_wrong = self._source.length_checks
        return self._local

    def _apply_totals(self, totals: Totals) -> None:
        """Act on the totals, which are the same on all ranks. Collective where they ask for a reshard."""
        self._global = totals
        length_checks = totals.num_lengths_checked, totals.num_lengths_wrong
        slowdown = compute_slowdowns(totals.rates)[self._group.rank]
        self._source.update(totals.num_unclaimed, slowdown, totals.loads, length_checks)
        num_done = totals.num_rows + self._planner.num_inherited_rows
        self._on_progress(dataclasses.replace(totals, num_rows=num_done))
        if self._leading_errors.needs_trial(totals, has_completions=self._planner.has_completions):
            self._reshard(spread_first=True)
            order = self._planner.order
            self._leading_errors.start_trial(order.rows[: order.num_spread].tolist())
            num_tried = format_count(order.num_spread, "row")
            logger.info(f"no row has succeeded yet, trying {num_tried} from the rest of the order before stopping")
        elif totals.num_reshard_requests or self._source.should_reshard(totals.num_groups_measured):
            self._reshard()

    # ---- reshard

    def _reshard(self, *, spread_first: bool = False) -> None:
        """Plan again with all ranks. Rows that are claimed and not yet in the engine return to the plan. Collective."""
        has_engine = not self._engine.is_abandoned
        self._source.close()
        self._source = self._planner.plan(self.get_state(), has_engine=has_engine, spread_first=spread_first)

    # ---- check

    def _check(self) -> None:
        """Raise if a result could not be recorded, or if the run must stop."""
        self._results.raise_if_failed()
        reason = self._stop_reason()
        if reason is not None:
            raise Interrupted(reason)
