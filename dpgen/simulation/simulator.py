"""The same claims and admission as a real run's, in virtual time: how long would it take, and on how many ranks?

Real are `ShardClaimer`, `RequestSource`, `AdmissionController` and `RowOrder`. Made up are the engines: a step that generates one token for each
of b sequences with k tokens in the KV cache takes A + C·b + K·k seconds (weights are read once a step, the KV cache
token by token), plus P for each prompt token that it computes; and what the KV cache has no room for is set back and
computed again, as vLLM does it.

Limits: no speculative decoding, no prefix cache, the same engine on every rank but for a factor; talking to the store
takes no time (`benchmarks/coordination.py` measures that).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dpgen.config.schema import WorkConfig
from dpgen.distributed.group import InMemoryStore
from dpgen.scheduling.admission import AdmissionController
from dpgen.scheduling.claims import ShardClaimer
from dpgen.scheduling.order import RowOrder, ShardSpec, order_by_measured_lengths
from dpgen.scheduling.prompt_groups import RankState
from dpgen.scheduling.request_source import RequestSource
from dpgen.scheduling.throughput import ThroughputMeter, compute_slowdowns

_AGREE_INTERVAL_S = 1.0  # as in `dpgen.scheduling.generation_loop`
_STATS_INTERVAL_S = 1.0  # as in `dpgen.engine.server`
_FAR_FROM_END_CLAIMS = 8  # claims from the end on, in which what is left everywhere decides nothing


@dataclass(frozen=True)
class EngineCostModel:
    """How fast an engine is.

    Attributes:
        step_s: A, of a step whatever it computes.
        seq_s: C, for each sequence that gains a token in it.
        kv_s: K, for each token that those sequences have in the KV cache.
        prefill_s: P, for each prompt token that it computes.
        max_num_seqs: sequences at a time.
        kv_tokens: tokens, of prompts and completions, that the KV cache holds; None for no limit.
    """

    step_s: float
    seq_s: float
    kv_s: float = 0.0
    prefill_s: float = 0.0
    max_num_seqs: int = 256
    kv_tokens: int | None = None

    def compute_lower_bounds_s(
        self, lengths: np.ndarray, prompt_lengths: np.ndarray, num_ranks: int
    ) -> tuple[float, float]:
        """What no schedule can beat: all work at full batches over all ranks, and the longest row by itself; seconds.

        Args:
            lengths, prompt_lengths: tokens to generate, and of the prompt, of each row.
        """
        read = lengths * prompt_lengths + lengths * (lengths + 1) / 2  # tokens that the KV cache gives, over all steps
        own_s = lengths * self.seq_s + read * self.kv_s + prompt_lengths * self.prefill_s
        work_s = (own_s.sum() + lengths.sum() * self.step_s / self.max_num_seqs) / num_ranks
        return float(work_s), float((own_s + lengths * self.step_s).max(initial=0))


@dataclass(frozen=True)
class SimulationResult:
    """What came of a simulated run.

    Attributes:
        wall_s: until the last rank was through.
        busy_s: of each rank, until its last row was finished.
        bound_s: no schedule can beat this.
        num_claims: claims over all ranks.
        num_preemptions: sequences that were set back.
    """

    wall_s: float
    busy_s: np.ndarray
    bound_s: float
    num_claims: int
    num_preemptions: int

    @property
    def efficiency(self) -> float:
        """The bound over the time that it took."""
        return self.bound_s / self.wall_s if self.wall_s else 1.0

    @property
    def balance(self) -> float:
        """The mean of the ranks' busy times over the longest."""
        return float(self.busy_s.mean() / self.busy_s.max()) if self.wall_s else 1.0


def simulate(
    model: EngineCostModel,
    lengths: np.ndarray,
    prompt_lengths: np.ndarray,
    order: RowOrder,
    num_ranks: int,
    work: WorkConfig,
    slowdown: Mapping[int, float] | None = None,
) -> SimulationResult:
    """One run over all rows of `order`.

    Args:
        lengths, prompt_lengths: tokens to generate, and of the prompt, of each row, int64.
        work: how rows are dealt; its `order` is not looked at.
        slowness: how many times as long as the model says some ranks take.
    """
    ranks = []
    for rank, claims_and_feed in enumerate(_plan_shards(order, num_ranks, work)):
        factor = (slowdown or {}).get(rank, 1.0)
        admission = AdmissionController(work.reserve_rows)
        ranks.append(_SimulatedRank(model, *claims_and_feed, admission, lengths, prompt_lengths, factor))
    wall_s = _run_events(ranks, work, order)
    bound_s = max(model.compute_lower_bounds_s(lengths[order.rows], prompt_lengths[order.rows], num_ranks))
    return SimulationResult(
        wall_s,
        np.array([each.busy_s for each in ranks]),
        bound_s,
        sum(each.claims.num_claims for each in ranks),
        sum(each.num_preemptions for each in ranks),
    )


def _plan_shards(
    order: RowOrder, num_ranks: int, work: WorkConfig, num_running: int = 0
) -> Iterator[tuple[_CountingClaimer, RequestSource]]:
    """Every rank's claims and feed, as `dpgen.scheduling.planner` makes them."""
    split = order.shard(num_ranks, work.claim_rows)
    store = InMemoryStore()
    cursors = [f"cursor/{rank}" for rank in range(num_ranks)]
    for cursor in cursors:
        store.add(cursor, 0)
    shards = cache(lambda shard: _SimulatedShard(order, split, shard))
    for rank in range(num_ranks):
        max_size = work.claim_rows if split.groups is None else 1
        claims = _CountingClaimer(
            store,
            cursors,
            split.sizes,
            rank,
            steal=work.steal,
            max_size=max_size,
            adaptive=split.groups is None,
        )
        feed = RequestSource(
            claims,
            shards,  # type: ignore[arg-type]
            _render_nothing,
            run_seed=None,
            sampling_columns={},
            fair_share=-(-(len(order.rows) + num_running) // num_ranks),
            num_probes=order.num_probes,
            length_tracker=order.make_tracker(),
        )
        yield claims, feed


def _run_events(ranks: Sequence[_SimulatedRank], work: WorkConfig, order: RowOrder) -> float:
    """Lets the rank whose clock is furthest behind go on, until all are through; seconds."""
    due = [(0.0, rank) for rank in range(len(ranks))]
    next_agreement_s = 0.0
    far = _FAR_FROM_END_CLAIMS * work.claim_rows * len(ranks)
    while due:
        now_s, rank = heapq.heappop(due)
        if now_s >= next_agreement_s:
            num_left = sum(each.feed.refresh_own_remaining() for each in ranks)
            for each, slow in zip(ranks, compute_slowdowns([each.rate() for each in ranks]), strict=True):
                each.feed.update(num_left, slow)
            if ranks[rank].feed.should_reshard(sum(each.feed.num_groups_measured for each in ranks)):
                _reshard(ranks, work, order)
                for through in set(range(len(ranks))) - {rank, *(other for _, other in due)}:
                    ranks[through].now_s = max(now_s, ranks[through].now_s)
                    heapq.heappush(due, (ranks[through].now_s, through))
            # All ranks together are looked at, which takes as long as thousands of rows: seldom, far from the end.
            next_agreement_s = now_s + (_AGREE_INTERVAL_S if num_left < far else 10 * _AGREE_INTERVAL_S)
        if ranks[rank].advance():
            heapq.heappush(due, (ranks[rank].now_s, rank))
    return max(each.busy_s for each in ranks)


def _reshard(ranks: Sequence[_SimulatedRank], work: WorkConfig, order: RowOrder) -> None:
    """Deals what no rank has finished or runs, by the lengths that were learnt; as `dpgen.scheduling.planner` does."""
    assert order.prompt_groups is not None
    states = [each.get_state() for each in ranks]
    begun = np.concatenate([rows for hand in states for rows in (hand.finished, hand.running)])
    todo = np.setdiff1d(order.rows, begun, assume_unique=True)
    counts = np.sum([order.prompt_groups.count(hand) for hand in states], axis=0)
    learnt = order_by_measured_lengths(np.sort(todo), order.prompt_groups, counts)
    num_running = sum(len(hand.running) for hand in states)
    for rank, (claims, feed) in zip(ranks, _plan_shards(learnt, len(ranks), work, num_running), strict=True):
        claims.num_claims = rank.claims.num_claims
        rank.claims, rank.feed = claims, feed


class _CountingClaimer(ShardClaimer):
    num_claims = 0

    def claim(self, limit: int) -> Any:
        self.num_claims += 1
        return super().claim(limit)


class _SimulatedShard:
    """The rows of a shard, for `RequestSource`; they have no columns."""

    def __init__(self, order: RowOrder, split: ShardSpec, shard: int) -> None:
        if split.groups is None:
            self._rows, self._starts = order.rows[shard :: len(split.sizes)], None
        else:
            self._rows, self._starts = split.groups[shard]

    def read_positions(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._starts is not None:
            start, stop = int(self._starts[start]), int(self._starts[stop])
        for row in self._rows[start:stop].tolist():
            yield row, {}


def _render_nothing(row: Mapping[str, Any]) -> tuple[list[int], None]:
    return [], None


class _SimulatedRank:
    """One rank and its engine. Its clock runs ahead of others' only between two claims."""

    def __init__(
        self,
        model: EngineCostModel,
        claims: _CountingClaimer,
        feed: RequestSource,
        admission: AdmissionController,
        lengths: np.ndarray,
        prompt_lengths: np.ndarray,
        factor: float,
    ) -> None:
        self.feed, self.claims = feed, claims
        self._model, self._admission = model, admission
        self._lengths, self._prompt_lengths = lengths, prompt_lengths
        self._step_s, self._seq_s, self._kv_s, self._prefill_s = (
            factor * each for each in (model.step_s, model.seq_s, model.kv_s, model.prefill_s)
        )
        self.now_s = self.busy_s = 0.0
        self.num_preemptions = 0
        self._step = 0
        self._waiting: deque[tuple[int, int, int]] = deque()  # (row, tokens to compute first, tokens to generate)
        self._running: list[tuple[int, int, int, int]] = []  # a heap: (last step, row, first step, tokens before it)
        self._num_kv_tokens = 0  # those of the running sequences, at this step
        self._num_to_prefill = 0
        self._next_stats_s = _STATS_INTERVAL_S
        self._finished: list[int] = []
        self._pace, self._num_tokens, self._next_note_s = ThroughputMeter(), 0, 0.0

    def get_state(self) -> RankState:
        """What it has done so far, and does now."""
        finished = np.array(self._finished, dtype=np.int64)
        return RankState(finished, self._lengths[finished], np.fromiter(self._admission, dtype=np.int64))

    def rate(self) -> int:
        """Its tokens/s lately, as it tells the others."""
        if self.feed.is_exhausted and not self._running:
            self._pace.reset()
        return self._pace.get_tokens_per_s(self.now_s)

    def advance(self) -> bool:
        """Goes on until it has to claim rows, or a second while it claims none; False once it is through."""
        while True:
            self._admit()
            self._start_waiting()
            if not self._running and self.feed.is_exhausted:
                return False
            if not self._running:  # it leaves what is left to others: until they have claimed it, or it is slow no more
                self.now_s += _AGREE_INTERVAL_S
                return True
            num_finished = self._advance_to_next_finish()
            # So many may now be prepared in their place: claims belong in the order of all ranks' clocks.
            if not self.feed.is_exhausted and self.feed.num_unrendered <= num_finished:
                return True

    def _admit(self) -> None:
        requests, _ = self._admission.admit(self.feed, self._model.max_num_seqs, self.now_s)
        for request in requests:
            row = request.row
            self._waiting.append((row, int(self._prompt_lengths[row]), int(self._lengths[row])))
        while self.feed.should_prefetch and self.feed.prefetch():
            pass

    def _start_waiting(self) -> None:
        limit = self._model.kv_tokens
        while self._waiting and len(self._running) < self._model.max_num_seqs:
            row, num_before, num_left = self._waiting[0]
            if limit is not None and self._running and self._num_kv_tokens + num_before > limit:
                return
            self._waiting.popleft()
            heapq.heappush(self._running, (self._step + max(1, num_left), row, self._step, num_before))
            self._num_kv_tokens += num_before
            self._num_to_prefill += num_before

    def _advance_to_next_finish(self) -> int:
        """Lets the engine step until a row is finished, or the KV cache is full; how many rows were finished."""
        num_running = len(self._running)
        num_steps = self._running[0][0] - self._step
        limit = self._model.kv_tokens
        if limit is not None and num_running > 1:
            num_steps = min(num_steps, max(1, (limit - self._num_kv_tokens) // num_running))
        self._step += num_steps
        started_s, num_tokens = self.now_s, num_steps * num_running
        read = num_steps * self._num_kv_tokens + num_running * num_steps * (num_steps + 1) // 2
        self.now_s += num_steps * (self._step_s + self._seq_s * num_running) + read * self._kv_s
        self.now_s += self._prefill_s * self._num_to_prefill
        self._num_to_prefill = 0
        self._num_kv_tokens += num_tokens
        self._record_throughput(started_s, num_tokens)
        num_finished = 0
        while self._running and self._running[0][0] <= self._step:
            _, row, first, num_before = heapq.heappop(self._running)
            self._num_kv_tokens -= num_before + self._step - first
            self._admission.release(row)
            self._finished.append(row)
            self.busy_s = self.now_s
            self.feed.record_finished(row)
            num_finished += 1
        if limit is not None:
            self._preempt(limit)
        return num_finished

    def _record_throughput(self, started_s: float, num_tokens: int) -> None:
        """Notes how many tokens there were at every second since `started_s`; a pace is of some ten seconds."""
        note_s, took_s = max(self._next_note_s, self.now_s - 12 * _STATS_INTERVAL_S), self.now_s - started_s
        while note_s <= self.now_s:
            share = (note_s - started_s) / took_s if took_s else 1.0
            self._pace.record(note_s, self._num_tokens + round(share * num_tokens))
            note_s += _STATS_INTERVAL_S
        self._next_note_s = note_s
        self._num_tokens += num_tokens

    def _preempt(self, limit: int) -> None:
        """Sets back the sequences that were started last, for as long as the next step would not fit."""
        while len(self._running) > 1 and self._num_kv_tokens + len(self._running) > limit:
            last = max(self._running, key=lambda each: (each[2], each[1]))
            self._running.remove(last)
            end, row, first, num_before = last
            num_tokens = num_before + self._step - first
            self._waiting.appendleft((row, num_tokens, end - self._step))
            self._num_kv_tokens -= num_tokens
            self.num_preemptions += 1
            heapq.heapify(self._running)
        if self.now_s >= self._next_stats_s:
            self._next_stats_s = self.now_s + _STATS_INTERVAL_S
            self._admission.update_limit(len(self._running), self.num_preemptions, self._model.max_num_seqs, self.now_s)
