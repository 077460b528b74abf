"""The generation loop: admit, collect, agree, until no rank has unfinished work.

Nothing in it waits while the engine could work: the engine always holds a few more rows than it runs, rendering
happens between its messages, the journal syncs beside it, and the ranks' agreement is an asynchronous all-reduce.
"""

from __future__ import annotations

import dataclasses
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from dpgen.data.detokenize import Detokenizer
from dpgen.distributed.group import PeerLost, PendingReduce, RankGroup
from dpgen.engine.messages import EngineStats, Event, RowsFinished
from dpgen.errors import DpgenError, Interrupted, PeerFailed
from dpgen.monitoring.run_report import RankManifest
from dpgen.records import Request, RowError, RowResult
from dpgen.scheduling.admission import AdmissionController
from dpgen.scheduling.prompt_groups import RankState
from dpgen.scheduling.request_source import RequestSource
from dpgen.scheduling.throughput import ThroughputMeter, compute_slowdowns

_SYNC_INTERVAL_S = 1.0
_STALE_SYNC_S = 5.0  # so much later than expected, an agreement is not waited for with what could be done
_REJECTION_WINDOW_S = 0.5
_FAILING_ROUNDS = 3  # agreements in which nothing but errors is to be seen, before the run counts as failing
_WAIT_S = 0.1  # the longest sleep while the engine is at work
_IDLE_WAIT_S = 0.01  # ... while this rank has nothing left and waits for the others


class Engine(Protocol):
    """What the loop needs of an engine."""

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def is_abandoned(self) -> bool: ...

    def submit(self, requests: list[Request]) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]: ...


class ResultSink(Protocol):
    """What the loop needs of a journal."""

    def append(self, result: RowResult) -> None: ...

    def raise_if_failed(self) -> None: ...


@dataclass
class Totals:
    """What the unfinished-work all-reduce sums: of one rank, or of all."""

    num_unfinished_ranks: int = 0
    num_rows: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompts' tokens, those that the engines had in their prefix caches
    num_preemptions: int = 0
    num_unclaimed: int = 0
    num_reshard_requests: int = 0
    num_groups_measured: int = 0  # groups of siblings; see `RequestSource.has_learnt`
    num_ranks_generating: int = 0
    rates: tuple[int, ...] = ()  # generated tokens/s, by rank; see `ThroughputMeter.rate`

    def as_list(self, rank: int, num_ranks: int, rate: int) -> list[int]:
        """Numbers to sum over all ranks: with a place for each rank's rate, of which a rank fills its own."""
        counts = [getattr(self, each.name) for each in fields(self) if each.name != "rates"]
        return [*counts, *(rate if other == rank else 0 for other in range(num_ranks))]

    @staticmethod
    def from_list(values: Sequence[int]) -> Totals:
        num_counts = len(fields(Totals)) - 1
        return Totals(*values[:num_counts], tuple(values[num_counts:]))  # type: ignore[call-arg, arg-type]


class GenerationLoop:
    """One rank's part of the run; `run` returns when every rank is through.

    Args:
        feed: this rank's rows.
        engine: a loaded engine.
        journal: takes every result.
        group: the ranks.
        deal: a new feed, over what no rank has finished or holds, given what this rank has, and whether it can
            generate; all ranks call it together: after an engine or a rank was lost, or lengths were learnt.
        stop_reason: why to stop now, or None to go on.
        detokenizer: makes the text of rows that the engine finishes without it.
        reserve_rows: sequences kept waiting in the engine beyond those that it runs.
        num_samples: a row's sequences, where the row itself doesn't say.
        max_leading_errors: stop if the first so many rows of the run are all errors; 0 never stops.
        say: prints a line.
    """

    def __init__(
        self,
        feed: RequestSource,
        engine: Engine,
        journal: ResultSink,
        group: RankGroup,
        *,
        reshard: Callable[[RankState, bool], RequestSource],
        stop_reason: Callable[[], str | None] = lambda: None,
        detokenizer: Detokenizer | None = None,
        reserve_rows: int = 32,
        num_samples: int = 1,
        max_leading_errors: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._feed, self._engine, self._journal, self._group = feed, engine, journal, group
        self._deal, self._stop_reason, self._say = reshard, stop_reason, say
        self._show: Callable[[Totals], None] = lambda totals: None
        self._max_leading_errors = max_leading_errors
        self._admission = AdmissionController(reserve_rows, num_samples)
        self._throughput = ThroughputMeter()
        self._detokenizer = detokenizer
        # Rows, and the tokens of each: twelve bytes a row, where a dictionary would take a hundred.
        self._finished_rows, self._kept_tokens = array("q"), array("i")
        self._local = Totals()
        self._num_kept_tokens = 0
        self._num_failing_rounds = 0
        self._first_error: tuple[int, RowError] | None = None
        self._agreement: PendingReduce | None = None
        self._next_agreement_s = 0.0
        self._global: Totals | None = None
        self._first_admitted_s: float | None = None
        self._last_finished_s = 0.0

    def fill_manifest(self, to: RankManifest) -> RankManifest:
        """This rank's numbers, filled in."""
        busy_s = 0.0 if self._first_admitted_s is None else self._last_finished_s - self._first_admitted_s
        return dataclasses.replace(
            to,
            num_prompt_tokens=self._local.num_prompt_tokens,
            num_generated_tokens=self._num_kept_tokens,
            num_cached_tokens=self._local.num_cached_tokens,
            num_preemptions=self._local.num_preemptions,
            busy_s=round(max(0.0, busy_s), 3),
        )

    def run(self, on_progress: Callable[[Totals], None] = lambda totals: None) -> Totals:
        """Generates until no rank has unfinished work; the totals of all ranks.

        Args:
            show: takes the totals of all ranks, about once a second.

        Raises:
            Interrupted: told to stop; what is finished is in the journal.
            NoEngineLeft: every rank's engine was given up.
            PeerFailed: another rank has failed, or was lost and can't be done without.
        """
        self._show = on_progress
        try:
            while self._global is None or self._global.num_unfinished_ranks > 0:
                self._group.heartbeat()
                self._admit()
                self._collect()
                self._sync_totals()
                self._journal.raise_if_failed()
                self._raise_if_interrupted()
        except (Interrupted, PeerFailed):
            self._drain_finished()
            raise
        finally:
            self._group.pause_heartbeat()
        return self._global

    @property
    def _has_work(self) -> bool:
        return len(self._admission) > 0 or not self._feed.is_exhausted

    def _admit(self) -> None:
        """Fills the engine up to its limit."""
        now = time.monotonic()
        requests, refused = self._admission.admit(self._feed, self._engine.max_num_seqs, now)
        for result in refused:
            self._record(result)
        if requests:
            self._first_admitted_s = self._first_admitted_s or now
            self._engine.submit(requests)

    def _collect(self) -> None:
        """Takes what the engine has finished; renders ahead while there is nothing to take."""
        events = self._engine.poll(0)
        if not events and self._feed.should_prefetch and not self._engine.is_abandoned and self._feed.prefetch():
            return
        finished = []
        for event in events or self._engine.poll(_WAIT_S if self._has_work else _IDLE_WAIT_S):
            if isinstance(event, RowsFinished):
                for row in event.rows:
                    self._admission.release(row)
                finished.append(event)
                self._last_finished_s = time.monotonic()
            elif isinstance(event, EngineStats):
                self._apply_engine_stats(event)
        try:
            self._admit()  # the engine first: what it has finished can wait for its text and the journal
        finally:  # also where the store is lost as rows are claimed
            for event in finished:
                self._record_all(event)

    def _record_all(self, finished: RowsFinished) -> None:
        for result in finished.results:
            self._record(result)
        for undecoded in finished.undecoded:
            assert self._detokenizer is not None
            self._record(self._detokenizer.decode_row(undecoded))

    def _apply_engine_stats(self, stats: EngineStats) -> None:
        """Takes the engine's own numbers; holds fewer rows where its KV cache is short of room."""
        now = time.monotonic()
        self._local.num_generated_tokens = max(stats.num_generated_tokens, self._num_kept_tokens)
        self._local.num_cached_tokens = stats.num_cached_tokens
        num_before, self._local.num_preemptions = self._local.num_preemptions, stats.num_preemptions
        if self._admission:
            self._throughput.record(now, self._local.num_generated_tokens)
        came_down = self._admission.update_limit(
            stats.num_running, stats.num_preemptions, self._engine.max_num_seqs, now
        )
        if came_down:
            self._say(
                f"the KV cache is short: {stats.num_preemptions - num_before:,} sequences were set back within a "
                f"second; going on with at most {self._admission.seq_limit:,} at a time"
            )

    def _record(self, result: RowResult) -> None:
        self._journal.append(result)
        if result.error is None:
            self._feed.record_finished(result.row)
        self._finished_rows.append(result.row)
        self._kept_tokens.append(result.num_generated_tokens)
        self._local.num_rows += 1
        self._local.num_prompt_tokens += result.num_prompt_tokens or 0
        self._num_kept_tokens += result.num_generated_tokens
        self._local.num_generated_tokens = max(self._local.num_generated_tokens, self._num_kept_tokens)
        if result.error is not None:
            self._local.num_errors += 1
            self._first_error = self._first_error or (result.row, result.error)

    def _sync_totals(self) -> None:
        """The unfinished-work all-reduce: termination, progress and what else concerns all ranks, in one."""
        now = time.monotonic()
        try:
            if self._agreement is None:
                # A rank that is through asks at once, again and again, so that the last rank's word ends the run.
                if self._has_work and now < self._next_agreement_s:
                    return
                self._next_agreement_s = now + _SYNC_INTERVAL_S
                if not self._has_work:
                    self._throughput.reset()
                mine = self._collect_local_totals().as_list(
                    self._group.rank, self._group.size, self._throughput.get_tokens_per_s(now)
                )
                self._agreement = self._group.all_reduce_async(mine, "sum")
            if not self._agreement.done():
                if now > self._next_agreement_s + _STALE_SYNC_S:
                    self._feed.stop_yielding()
                return
            totals = Totals.from_list(self._agreement.result())
            self._agreement = None
            self._apply_totals(totals)
        except PeerLost as lost:
            self._recover_from_lost_peer(lost)

    def _apply_totals(self, totals: Totals) -> None:
        """Does what all ranks, who have the same numbers, do now."""
        self._global = totals
        self._feed.update(totals.num_unclaimed, compute_slowdowns(totals.rates)[self._group.rank])
        self._show(self._global)
        self._abort_if_all_rows_fail(self._global)
        if self._global.num_reshard_requests or self._feed.should_reshard(totals.num_groups_measured):
            self._reshard()

    def _collect_local_totals(self) -> Totals:
        is_stranded = self._engine.is_abandoned and self._has_work
        self._local.num_reshard_requests = int(is_stranded)
        self._local.num_groups_measured = self._feed.num_groups_measured
        self._local.num_unfinished_ranks = int(self._has_work)
        self._local.num_unclaimed = self._feed.refresh_own_remaining()
        # A row that the engine refuses comes back at once; one that stays is being generated, and may turn out well.
        oldest_s = self._admission.oldest_admitted_s
        stays = oldest_s is not None and time.monotonic() - oldest_s > _REJECTION_WINDOW_S
        self._local.num_ranks_generating = int(stays)
        return self._local

    def _reshard(self) -> None:
        """Deals what is left anew, with all other ranks: a lost one's rows go to others, and long ones come first."""
        if self._engine.is_abandoned:
            self._admission.clear()
        # What is claimed and not yet in the engine goes back into the deal.
        hand = RankState(
            np.array(self._finished_rows, dtype=np.int64),
            np.array(self._kept_tokens, dtype=np.int64),
            np.fromiter(self._admission, dtype=np.int64),
        )
        self._feed = self._deal(hand, not self._engine.is_abandoned)

    def _recover_from_lost_peer(self, lost: PeerLost) -> None:
        """Goes on with the ranks that are left, if this launcher lets them live."""
        while True:
            if not self._group.can_shrink:
                raise lost
            self._say(f"{lost}; going on without it, if that can be")
            try:
                self._group.shrink()
                self._agreement = None
                self._reshard()
                return
            except PeerLost as another:  # lost while the group was being made anew
                lost = another

    def _raise_if_interrupted(self) -> None:
        reason = self._stop_reason()
        if reason is not None:
            raise Interrupted(reason)

    def _drain_finished(self) -> None:
        """Journals what the engine has finished by now: the run ends, and those rows need not be generated again."""
        for event in self._engine.poll(0):
            if isinstance(event, RowsFinished):
                self._record_all(event)

    def _abort_if_all_rows_fail(self, totals: Totals) -> None:
        """Ends the run, on all ranks alike, if everything so far is an error."""
        if not 0 < self._max_leading_errors <= totals.num_errors == totals.num_rows:
            self._num_failing_rounds = 0
            return
        # Rows that were given to an engine a moment ago get the time to turn out well.
        self._num_failing_rounds = 0 if totals.num_ranks_generating else self._num_failing_rounds + 1
        if self._num_failing_rounds < _FAILING_ROUNDS and totals.num_unfinished_ranks:
            return
        told = "the first row failed" if totals.num_rows == 1 else f"the first {totals.num_rows:,} rows all failed"
        if self._first_error is None:
            raise PeerFailed(told)  # a rank that has seen an error shows it
        row, error = self._first_error
        raise DpgenError(
            f"{told}, so the fault is likely in the configuration; row {row}: {error.type}: {error.message} "
            "(run.max_leading_errors=0 goes on regardless)"
        )
