"""Simulate a run in virtual time: how long it takes on a number of ranks.

- Real: `SourceMaker` with its claimers and sources, `AdmissionController`, `RowOrder`, `ThroughputMeter`.
- Modelled: the engines. A step that generates one token for each of b sequences with k tokens in the KV cache takes
  A + C·b + K·k seconds (weights are read once per step, the KV cache token by token), plus P for each prompt token
  that it computes. Sequences that don't fit in the KV cache are preempted and recomputed, as in vLLM.
- The same arguments always give the same result.

Limits: no speculative decoding; no prefix cache; the same engine on every rank, but for a factor; the store answers
in no time (`benchmarks/coordination.py` measures how long it takes).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dpgen.config.sections import WorkConfig
from dpgen.data.prompts.render import RenderedPrompt
from dpgen.distributed.group import InMemoryStore
from dpgen.records import RequestId
from dpgen.scheduling.admission import AdmissionController
from dpgen.scheduling.claims import Claim, ShardClaimer
from dpgen.scheduling.groups.prompt_groups import RankState
from dpgen.scheduling.order import RowOrder, order_by_measured_lengths
from dpgen.scheduling.progress.throughput import ThroughputMeter, compute_slowdowns
from dpgen.scheduling.request_builder import RequestBuilder
from dpgen.scheduling.request_source import RequestSource
from dpgen.scheduling.shards import ShardSpec
from dpgen.scheduling.sources import SourceMaker
from dpgen.scheduling.tail.bound import StepCosts, compute_bound

_SYNC_INTERVAL_S = 1.0  # as in `dpgen.scheduling.generation_loop`
_STATS_INTERVAL_S = 1.0  # as in `dpgen.engine.server`
_FAR_FROM_END_CLAIMS = 8  # largest claims of every rank; while more remains, fresh totals change no decision


@dataclass(frozen=True)
class EngineCostModel:
    """Costs of an engine's step.

    Attributes:
        step_s: A, seconds per step.
        seq_s: C, seconds per sequence that gains a token in the step.
        kv_s: K, seconds per token that these sequences have in the KV cache.
        prefill_s: P, seconds per prompt token that is computed.
        max_num_seqs: sequences that run at a time.
        kv_tokens: tokens, of prompts and completions, that the KV cache holds; None for no limit.
    """

    step_s: float
    seq_s: float
    kv_s: float = 0.0
    prefill_s: float = 0.0
    max_num_seqs: int = 256
    kv_tokens: int | None = None

    def compute_bound_s(self, lengths: np.ndarray, prompt_lengths: np.ndarray, num_ranks: int) -> float:
        """Return the time in seconds that no schedule can beat; see `dpgen.scheduling.tail.bound`.

        Args:
            lengths: tokens to generate of each row, int64[num_rows].
            prompt_lengths: prompt tokens of each row, int64[num_rows].
        """
        costs = StepCosts(self.step_s, self.seq_s, self.max_num_seqs)
        return compute_bound(lengths, costs, num_ranks, self._compute_row_costs_s(lengths, prompt_lengths))

    def compute_full_batches_s(self, lengths: np.ndarray, prompt_lengths: np.ndarray, num_ranks: int) -> float:
        """Return the seconds that all work takes in full batches; arguments as for `compute_bound_s`."""
        work_s = self._compute_row_costs_s(lengths, prompt_lengths).sum()
        return float(work_s + lengths.sum() * self.step_s / self.max_num_seqs) / num_ranks

    def _compute_row_costs_s(self, lengths: np.ndarray, prompt_lengths: np.ndarray) -> np.ndarray:
        """Return what each row costs beyond the steps, float64[num_rows]."""
        kv_reads = lengths * prompt_lengths + lengths * (lengths + 1) / 2  # tokens, summed over a row's steps
        costs_s: np.ndarray = lengths * self.seq_s + kv_reads * self.kv_s + prompt_lengths * self.prefill_s
        return costs_s


@dataclass(frozen=True)
class Workload:
    """Rows of a simulated run.

    Attributes:
        lengths: tokens to generate of each row, int64[num_dataset_rows].
        prompt_lengths: prompt tokens of each row, int64[num_dataset_rows].
        order: rows to run, in order of work.
    """

    lengths: np.ndarray
    prompt_lengths: np.ndarray
    order: RowOrder


@dataclass(frozen=True)
class SimulationResult:
    """Times and counts of a simulated run.

    Attributes:
        wall_s: time until the last rank is finished.
        busy_s: time until each rank's last row is finished, float64[num_ranks].
        bound_s: time that no schedule can beat; see `dpgen.scheduling.tail.bound`.
        num_claims: claims, over all ranks.
        num_preemptions: preempted sequences, over all ranks.
    """

    wall_s: float
    busy_s: np.ndarray
    bound_s: float
    num_claims: int
    num_preemptions: int

    @property
    def efficiency(self) -> float:
        """Return the bound over the time taken."""
        return self.bound_s / self.wall_s if self.wall_s else 1.0

    @property
    def balance(self) -> float:
        """Return the mean over the maximum of the ranks' busy times."""
        return float(self.busy_s.mean() / self.busy_s.max()) if self.wall_s else 1.0


def simulate(
    model: EngineCostModel,
    workload: Workload,
    num_ranks: int,
    work: WorkConfig,
    slowdown: Mapping[int, float] | None = None,
    start_s: Mapping[int, float] | None = None,
) -> SimulationResult:
    """Simulate one run over all rows of `workload.order`.

    Args:
        work: settings of claims and admission; its `order` is ignored.
        slowdown: rank → factor on all times of its engine; 1 for a rank that is not in it.
        start_s: rank → seconds after which its engine is ready; 0 for a rank that is not in it.
    """
    order, factors, delays_s = workload.order, slowdown or {}, start_s or {}
    ranks = [
        _SimulatedRank(model, workload, claimer, source, work.reserve_rows, factors.get(rank, 1.0))
        for rank, (claimer, source) in enumerate(_plan_shards(order, num_ranks, work, model.max_num_seqs))
    ]
    for rank, delay_s in delays_s.items():
        ranks[rank].now_s = delay_s
    wall_s = _run_events(ranks, work, order, model.max_num_seqs)
    bound_s = model.compute_bound_s(workload.lengths[order.rows], workload.prompt_lengths[order.rows], num_ranks)
    return SimulationResult(
        wall_s,
        np.array([rank.busy_s for rank in ranks]),
        bound_s,
        sum(rank.claimer.num_claims for rank in ranks),
        sum(rank.num_preemptions for rank in ranks),
    )


def _plan_shards(
    order: RowOrder, num_ranks: int, work: WorkConfig, max_num_seqs: int, num_running: int = 0
) -> list[tuple[_CountingClaimer, RequestSource]]:
    """Return every rank's claimer and source, as `dpgen.scheduling.planner` makes them."""
    store, cursors = InMemoryStore(), [f"cursor/{rank}" for rank in range(num_ranks)]
    for cursor in cursors:
        store.add(cursor, 0)
    maker = SourceMaker(order, work, num_ranks, num_running=num_running, max_num_seqs=max_num_seqs)
    open_shard = cache(lambda index: _SimulatedShard(order, maker.shards, index))
    builder = RequestBuilder(_render_nothing, None, {})
    claimers = [maker.make_claimer(_CountingClaimer, store, cursors, rank) for rank in range(num_ranks)]
    return [(claimer, maker.make_source(claimer, open_shard, builder)) for claimer in claimers]


def _run_events(ranks: Sequence[_SimulatedRank], work: WorkConfig, order: RowOrder, max_num_seqs: int) -> float:
    """Advance the rank whose clock is furthest behind, until all are finished; return the time in seconds."""
    due = [(rank.now_s, number) for number, rank in enumerate(ranks)]
    heapq.heapify(due)
    next_sync_s = _SYNC_INTERVAL_S
    far_from_end = _FAR_FROM_END_CLAIMS * work.claim_rows * len(ranks) if len(ranks) > 64 else np.inf
    while due:
        now_s, rank = heapq.heappop(due)
        if now_s >= next_sync_s:
            num_unclaimed = _sync_totals(ranks)
            if ranks[rank].source.should_reshard(sum(other.source.num_groups_measured for other in ranks)):
                _reshard(ranks, work, order, max_num_seqs)
                _wake_idle_ranks(ranks, due, rank, now_s)
            # A sync visits every rank, which takes as long as simulating thousands of rows: few while far from the end.
            next_sync_s = now_s + (10 if num_unclaimed >= far_from_end else 1) * _SYNC_INTERVAL_S
        if ranks[rank].advance():
            heapq.heappush(due, (ranks[rank].now_s, rank))
    return max(rank.busy_s for rank in ranks)


def _sync_totals(ranks: Sequence[_SimulatedRank]) -> int:
    """Share totals and rates, as `dpgen.scheduling.generation_loop` does; return the number of unclaimed positions."""
    num_unclaimed = sum(rank.source.refresh_own_remaining() for rank in ranks)
    loads = [rank.source.load for rank in ranks]
    checks = [rank.source.length_checks for rank in ranks]
    length_checks = (sum(checked for checked, _ in checks), sum(wrong for _, wrong in checks))
    slowdowns = compute_slowdowns([rank.get_tokens_per_s() for rank in ranks])
    for rank, slowdown in zip(ranks, slowdowns, strict=True):
        rank.source.update(num_unclaimed, slowdown, loads, length_checks)
    return num_unclaimed


def _reshard(ranks: Sequence[_SimulatedRank], work: WorkConfig, order: RowOrder, max_num_seqs: int) -> None:
    """Plan rows that no rank has finished or is running, by measured lengths, as `dpgen.scheduling.planner` does."""
    assert order.prompt_groups is not None
    states = [rank.get_state() for rank in ranks]
    begun = np.concatenate([rows for state in states for rows in (state.finished, state.running)])
    remaining = np.setdiff1d(order.rows, begun, assume_unique=True)
    counts = np.sum([order.prompt_groups.count(state) for state in states], axis=0)
    new_order = order_by_measured_lengths(np.sort(remaining), order.prompt_groups, counts, order.adapter_groups)
    num_running = sum(len(state.running) for state in states)
    plan = _plan_shards(new_order, len(ranks), work, max_num_seqs, num_running)
    for rank, (claimer, source) in zip(ranks, plan, strict=True):
        claimer.num_claims = rank.claimer.num_claims
        rank.claimer, rank.source = claimer, source


def _wake_idle_ranks(ranks: Sequence[_SimulatedRank], due: list[tuple[float, int]], current: int, now_s: float) -> None:
    """Make ranks that had no rows left due again, since a reshard gave them some."""
    for rank in set(range(len(ranks))) - {current, *(rank for _, rank in due)}:
        ranks[rank].now_s = max(now_s, ranks[rank].now_s)
        heapq.heappush(due, (ranks[rank].now_s, rank))


class _CountingClaimer(ShardClaimer):
    """Count the claims of a `ShardClaimer`."""

    num_claims = 0

    def claim(self, limit: int) -> Claim | None:
        self.num_claims += 1
        return super().claim(limit)


class _SimulatedShard:
    """Provide the rows of a shard to a `RequestSource`, without columns."""

    def __init__(self, order: RowOrder, shards: ShardSpec, index: int) -> None:
        self._rows = shards.list_rows(order.rows, index)
        chunks = shards.get_chunks(order.rows, index)
        self._chunk_starts = None if chunks is None else chunks[1]

    def read_positions(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._chunk_starts is not None:
            start, stop = int(self._chunk_starts[start]), int(self._chunk_starts[stop])
        for row in self._rows[start:stop].tolist():
            yield row, {}


def _render_nothing(columns: Mapping[str, Any]) -> RenderedPrompt:
    return RenderedPrompt([])


class _SimulatedRank:
    """Simulate one rank and its engine. Its clock runs ahead of the others' only between two claims.

    Args:
        factor: multiplies all times of the engine.
    """

    def __init__(
        self,
        model: EngineCostModel,
        workload: Workload,
        claimer: _CountingClaimer,
        source: RequestSource,
        reserve_rows: int,
        factor: float,
    ) -> None:
        self.claimer, self.source = claimer, source
        self.now_s = self.busy_s = 0.0
        self.num_preemptions = 0
        self._max_num_seqs, self._kv_tokens = model.max_num_seqs, model.kv_tokens
        self._step_s, self._seq_s, self._kv_s, self._prefill_s = (
            factor * cost_s for cost_s in (model.step_s, model.seq_s, model.kv_s, model.prefill_s)
        )
        self._lengths, self._prompt_lengths = workload.lengths, workload.prompt_lengths
        self._admission = AdmissionController(reserve_rows)
        self._step = 0
        self._waiting: deque[tuple[int, int, int]] = deque()  # (row, tokens to prefill, tokens to generate)
        self._running: list[tuple[int, int, int, int]] = []  # a heap: (last step, row, first step, prefilled tokens)
        self._num_kv_tokens = 0  # of the running sequences, at this step
        self._num_to_prefill = 0
        self._next_stats_s = _STATS_INTERVAL_S
        self._finished: list[int] = []
        self._throughput, self._num_tokens, self._next_sample_s = ThroughputMeter(), 0, 0.0

    def get_state(self) -> RankState:
        finished = np.array(self._finished, dtype=np.int64)
        return RankState(finished, self._lengths[finished], np.fromiter(self._admission, dtype=np.int64))

    def get_tokens_per_s(self) -> int:
        """Return the rank's rate as the other ranks see it."""
        if self.source.is_exhausted and not self._running:
            self._throughput.reset()
        return self._throughput.get_tokens_per_s(self.now_s)

    def advance(self) -> bool:
        """Run until the rank has to claim rows, or for a second while it yields; return False once it is finished."""
        while True:
            self._admit()
            self._start_waiting()
            if not self._running and self.source.is_exhausted:
                return False
            if not self._running:  # yields, until the others have claimed the remaining rows or it is slow no more
                self.now_s += _SYNC_INTERVAL_S
                return True
            num_finished = self._advance_to_next_finish()
            if not num_finished:  # long rows: the other ranks must see how far they are
                return True
            # As many rows may be prefetched in their place, which may take a claim. Claims must come in the order of
            # all ranks' clocks.
            if not self.source.is_exhausted and self.source.num_unrendered <= num_finished:
                return True

    def _admit(self) -> None:
        requests, _ = self._admission.admit(self.source, self._max_num_seqs, self.now_s)
        for request in requests:
            row = request.row
            self._waiting.append((row, int(self._prompt_lengths[row]), int(self._lengths[row])))
        while self.source.should_prefetch and self.source.prefetch():
            pass

    def _start_waiting(self) -> None:
        limit = self._kv_tokens
        while self._waiting and len(self._running) < self._max_num_seqs:
            row, num_prefill, num_tokens = self._waiting[0]
            if limit is not None and self._running and self._num_kv_tokens + num_prefill > limit:
                return
            self._waiting.popleft()
            heapq.heappush(self._running, (self._step + max(1, num_tokens), row, self._step, num_prefill))
            self._num_kv_tokens += num_prefill
            self._num_to_prefill += num_prefill

    def _advance_to_next_finish(self) -> int:
        """Step the engine until a row is finished or the KV cache is full; return the number of finished rows."""
        num_running = len(self._running)
        num_steps = self._running[0][0] - self._step
        if self._kv_tokens is not None and num_running > 1:
            num_steps = min(num_steps, max(1, (self._kv_tokens - self._num_kv_tokens) // num_running))
        step_s = self._step_s + self._seq_s * num_running + self._kv_s * self._num_kv_tokens
        num_steps = min(num_steps, max(1, int(_SYNC_INTERVAL_S / max(step_s, 1e-9))))
        self._step += num_steps
        self.source.advance(num_steps)
        started_s, num_tokens = self.now_s, num_steps * num_running
        kv_reads = num_steps * self._num_kv_tokens + num_running * num_steps * (num_steps + 1) // 2
        self.now_s += num_steps * (self._step_s + self._seq_s * num_running) + kv_reads * self._kv_s
        self.now_s += self._prefill_s * self._num_to_prefill
        self._num_to_prefill = 0
        self._num_kv_tokens += num_tokens
        self._record_throughput(started_s, num_tokens)
        num_finished = self._release_finished()
        if self._kv_tokens is not None:
            self._preempt(self._kv_tokens)
        return num_finished

    def _release_finished(self) -> int:
        num_finished = 0
        while self._running and self._running[0][0] <= self._step:
            _, row, first_step, num_prefill = heapq.heappop(self._running)
            self._num_kv_tokens -= num_prefill + self._step - first_step
            self._admission.release([RequestId(row)])
            self._finished.append(row)
            self.busy_s = self.now_s
            self.source.release(row, int(self._lengths[row]))
            self.source.record_finished(row)
            num_finished += 1
        return num_finished

    def _record_throughput(self, started_s: float, num_tokens: int) -> None:
        """Record the tokens at every second since `started_s`; only the last 12 s, since a rate covers about ten."""
        sample_s = max(self._next_sample_s, self.now_s - 12 * _STATS_INTERVAL_S)
        took_s = self.now_s - started_s
        while sample_s <= self.now_s:
            fraction = (sample_s - started_s) / took_s if took_s else 1.0
            self._throughput.record(sample_s, self._num_tokens + round(fraction * num_tokens))
            sample_s += _STATS_INTERVAL_S
        self._next_sample_s = sample_s
        self._num_tokens += num_tokens

    def _preempt(self, limit: int) -> None:
        """Preempt the sequences that started last, as long as the next step would exceed `limit` tokens."""
        while len(self._running) > 1 and self._num_kv_tokens + len(self._running) > limit:
            newest = max(self._running, key=lambda sequence: (sequence[2], sequence[1]))
            self._running.remove(newest)
            last_step, row, first_step, num_prefill = newest
            num_tokens = num_prefill + self._step - first_step
            self._waiting.appendleft((row, num_tokens, last_step - self._step))
            self._num_kv_tokens -= num_tokens
            self.num_preemptions += 1
            heapq.heapify(self._running)
        if self.now_s >= self._next_stats_s:
            self._next_stats_s = self.now_s + _STATS_INTERVAL_S
            self._admission.update_limit(len(self._running), self.num_preemptions, self._max_num_seqs, self.now_s)
