"""The end of a run: the bound that no schedule beats, blocks of long rows, and ranks that leave rows to others."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from dpgen.distributed.group import InMemoryStore
from dpgen.scheduling.claims import Claim, ClaimPolicy, ShardClaimer
from dpgen.scheduling.order import RowOrder
from dpgen.scheduling.progress.step_times import (
    RankSpeed,
    StepMeter,
    StepSamples,
    compute_efficiency,
    fit_step_costs,
    summarize_lengths,
)
from dpgen.scheduling.tail.bound import StepCosts, compute_bound
from dpgen.scheduling.tail.heads import plan_heads
from dpgen.scheduling.tail.held_work import NO_LOAD, HeldWork, Load


def longest_first(lengths: np.ndarray) -> np.ndarray:
    return np.sort(lengths)[::-1]


# ---- the bound


def test_equal_rows_are_bound_by_full_batches() -> None:
    costs = StepCosts(2.0, 0.5, 4)
    assert compute_bound(np.full(32, 10), costs, 2) == pytest.approx(32 * 10 * (0.5 + 2.0 / 4) / 2)


def test_one_giant_row_is_bound_by_itself() -> None:
    costs = StepCosts(2.0, 0.5, 4)
    assert compute_bound(np.array([1000, *[1] * 20]), costs, 8) == pytest.approx(1000 * 2.5)


def test_a_rank_with_a_long_row_has_less_time_for_others() -> None:
    # On one rank, 300 tokens fill the steps of a row of 100: 100 x 2 + 400 x 0.5.
    costs, lengths = StepCosts(2.0, 0.5, 4), np.array([100, *[1] * 300])
    assert compute_bound(lengths, costs, 1) == pytest.approx(400, rel=1e-3)
    # On two ranks, the first spends 200 of W on these steps, so that it gains (W - 200) / 0.5 tokens. The other one
    # gains W, in full batches at 1 a token.
    assert compute_bound(lengths, costs, 2) == pytest.approx((400 + 400) / 3, rel=1e-3)


def test_no_schedule_of_a_few_rows_beats_the_bound() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        costs = StepCosts(
            random.uniform(0, 3), random.uniform(0, 2), int(random.integers(1, 4)), random.uniform(0, 0.1)
        )
        lengths = random.integers(1, 40, 6)
        ends = [
            max(fill(lengths[np.array(ranks) == rank], costs) for rank in range(2))
            for ranks in itertools.product(range(2), repeat=len(lengths))
        ]
        assert compute_bound(lengths, costs, 2) <= min(ends) * (1 + 1e-6)


def fill(lengths: np.ndarray, costs: StepCosts) -> float:
    """Return the least time that a rank takes for these rows: as many steps as its longest row or its lanes need."""
    if not len(lengths):
        return 0.0
    steps = max(lengths.max(), -(-lengths.sum() // costs.max_num_seqs))
    return float(costs.step * steps + costs.compute_row_costs(lengths).sum())


def test_a_row_that_stands_for_many_counts_as_many() -> None:
    costs = StepCosts(6.0, 0.03, 256)
    lengths = np.random.default_rng(0).lognormal(5, 0.7, 4000).astype(np.int64)
    values, counts = np.unique(lengths, return_counts=True)
    bound = compute_bound(lengths, costs, 4)
    assert compute_bound(values, costs, 4, counts=counts.astype(float)) == pytest.approx(bound, rel=1e-3)
    short, numbers = summarize_lengths(lengths)
    assert len(short) == 1024 and sum(numbers) == len(lengths) and short[0] == lengths.max()
    assert compute_bound(np.array(short), costs, 4, counts=np.array(numbers)) == pytest.approx(bound, rel=0.01)
    assert compute_bound(np.zeros(0, dtype=np.int64), costs, 4) == 0


# ---- blocks of long rows


def test_rows_that_outlast_full_batches_get_a_rank_of_their_own() -> None:
    costs = StepCosts(6.0, 0.03, 256)
    lengths = longest_first(np.append(np.full(6000, 200), [3000, 2900]))
    plan = plan_heads(lengths, costs, 4)
    assert plan.ends[0] >= 2 and len(plan.ends) == 1, "both long rows share a rank"
    assert plan_heads(np.full(6000, 200), costs, 4).ends == ()
    assert plan_heads(longest_first(np.append(np.full(600_000, 200), 3000)), costs, 4).ends == (), "no hurry"


def test_a_row_longer_than_all_else_makes_no_other_block_larger() -> None:
    costs = StepCosts(6.0, 0.03, 256)
    rest = longest_first(np.random.default_rng(0).lognormal(5, 0.9, 6000))
    alone, beside = plan_heads(rest, costs, 3), plan_heads(np.append(50 * rest[0], rest), costs, 4)
    assert beside.ends[0] < 300 and beside.end < 1.2 * alone.end


def test_each_block_is_claimed_once_and_by_the_ranks_that_come_first() -> None:
    order = RowOrder(np.arange(100), "longest_first", lengths=np.arange(100, 0, -1, dtype=np.float32))
    shards = order.shard(4, 8, head_ends=(2, 9))
    store, cursors = InMemoryStore(), [f"cursor/{rank}" for rank in range(4)]
    for cursor in cursors:
        store.add(cursor, 0)
    policy = ClaimPolicy(steal=True, max_size=8)
    claimers = [ShardClaimer(store, cursors, shards.sizes, rank, policy, shards.num_heads) for rank in range(4)]

    def list_rows(claim: Claim) -> Any:
        if (chunks := shards.get_chunks(order.rows, claim.shard)) is not None:
            rows, starts = chunks
            return rows[starts[claim.start] : starts[claim.stop]].tolist()
        return shards.list_rows(order.rows, claim.shard)[claim.start : claim.stop].tolist()

    first = [claim for rank in (2, 0, 1, 3) if (claim := claimers[rank].claim(8))]
    assert [list_rows(claim) for claim in first[:2]] == [[0, 1], [2, 3, 4, 5, 6, 7, 8]]
    rows = [row for claim in first for row in list_rows(claim)]
    while claim := next((claim for claimer in claimers if (claim := claimer.claim(8))), None):
        rows += list_rows(claim)
    assert sorted(rows) == list(range(100))


def test_a_block_that_no_other_rank_came_for_is_claimed_in_the_end() -> None:
    store = InMemoryStore()
    for rank in range(2):
        store.add(f"cursor/{rank}", 0)
    claimer = ShardClaimer(store, ["cursor/0", "cursor/1"], [0, 3], 0, ClaimPolicy(steal=True, max_size=8), 2)
    claims = []
    while claim := claimer.claim(8):
        claims.append((claim.shard, claim.start))
    assert claims[0] == (2, 0) and claims[-1] == (2, 1) and len(claims) == 5


# ---- leaving rows to others


def make_held_work(lengths: list[float]) -> HeldWork:
    """Return what a rank of four holds of a shard whose rows have these lengths."""
    values = np.array(lengths, dtype=np.float32)
    costs = StepCosts(10.0, 1.0, 4)
    return HeldWork(lambda claim: values[claim.start : claim.stop], values, costs, end=10_000.0, num_ranks=4)


def test_a_rank_with_a_long_row_leaves_the_next_row_to_ranks_that_end_sooner() -> None:
    held = make_held_work([100, *[5] * 20])
    held.hold(Claim(0, 0, 1), [7])
    assert held.measure() == Load(1100, slack=300)
    held.update([Load(1100, 300), Load(0), Load(0), Load(0)], 0, 0)
    assert held.count_affordable(20) == 0
    held.release(7, 100)
    assert held.count_affordable(20) == 20, "it claims again once the long row is finished"


def test_rows_that_fill_gaps_are_claimed_while_all_others_end_later() -> None:
    held = make_held_work([100, *[5] * 20])
    held.hold(Claim(0, 0, 1), [7])
    held.update([Load(1100, 300), *[Load(3000)] * 3], 0, 0)
    assert held.count_affordable(20) == 20


def test_rows_come_closer_to_their_end_with_each_step() -> None:
    held = make_held_work([100, *[5] * 20])
    held.hold(Claim(0, 0, 1), [7])
    held.advance(50)
    assert held.measure().time == 1100, "the engine does not have it yet"
    held.start(7)
    held.advance(60)
    assert held.measure().time == 440
    held.advance(60)
    assert held.measure().time == 0, "it has outlived its expected length"


def test_not_all_ranks_leave_the_rest_to_others() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = longest_first(random.integers(1, 300, 60)).astype(float).tolist()
        ranks = []
        for number in range(4):
            held = make_held_work(lengths)
            held.hold(Claim(0, 8 * number, 8 * number + 8), range(8))
            for row in range(8):
                held.start(row)
            held.advance(float(random.integers(0, 300)))
            ranks.append(held)
        loads = [held.measure() for held in ranks]
        for held in ranks:
            held.update(loads, 0, 0)
        assert any(held.count_affordable(28) for held in ranks)


def test_expected_lengths_that_do_not_come_true_keep_no_rank_from_claiming() -> None:
    held = make_held_work([100, *[5] * 20])
    held.hold(Claim(0, 0, 3), [7, 8, 9])
    held.release(8, 5)
    held.release(9, 3)
    assert (held.num_checked, held.num_wrong) == (2, 1)
    loads = [Load(1100, 300), Load(0), Load(0), NO_LOAD]
    held.update(loads, 100, 20)
    assert held.count_affordable(18) == 0
    held.update(loads, 100, 30)
    assert held.count_affordable(18) > 0


# ---- what a run measures


def sample_steps(step_s: float, seq_s: float, seqs: list[float]) -> StepSamples:
    samples = StepSamples()
    for number in seqs:
        samples.add(number, step_s + seq_s * number)
    return samples


def test_the_costs_of_a_step_are_found_from_reports_of_the_engine() -> None:
    meter, now_s, num_tokens = StepMeter(), 0.0, 0
    for running in [256] * 10 + [128] * 5 + [16] * 5 + [0, 0]:
        meter.record(now_s, num_tokens, running)
        now_s += 100 * (6e-3 + 29e-6 * running)
        num_tokens += 100 * running
    costs = fit_step_costs([RankSpeed(meter.samples, max_num_seqs=256)])
    assert costs is not None and costs.max_num_seqs == 256
    assert costs.step == pytest.approx(6e-3, rel=0.15) and costs.sequence == pytest.approx(29e-6, rel=0.15)


def test_the_time_in_which_an_engine_starts_again_is_no_step_s() -> None:
    meter, now_s, num_tokens = StepMeter(), 0.0, 0
    for number in range(20):
        meter.record(now_s, num_tokens, 256, elapsed_s=number % 10)
        now_s += 40.0 if number == 9 else 1.0  # the engine dies, and loads its model again
        num_tokens += 25_600
    assert meter.samples.num_samples == 18
    assert meter.samples.time_s / 18 == pytest.approx(0.01), "the run was slower than its steps, and says so"


def test_costs_are_left_out_where_samples_say_too_little() -> None:
    few, alike = sample_steps(6e-3, 0, [1, 256]), sample_steps(6e-3, 0, [250, 256] * 20)
    assert fit_step_costs([RankSpeed(few)]) is None and fit_step_costs([RankSpeed(alike)]) is None
    half_full = RankSpeed(alike, [200] * 500, [1.0] * 500, max_num_seqs=512)
    assert fit_step_costs([half_full]) is None, "what full steps cost is not known"
    assert compute_efficiency([], 60.0) is None
    without_engines = RankSpeed(sample_steps(6e-3, 30e-6, [1, 256] * 20), [100], [1.0], max_num_seqs=0)
    assert compute_efficiency([without_engines], 60.0) is None, "every engine was abandoned by the end"


def test_a_run_whose_engines_are_always_full_has_an_efficiency() -> None:
    samples = sample_steps(6e-3, 30e-6, [250, 256, 256, 256] * 10)
    speeds = [RankSpeed(samples, [200] * 500, [4.0] * 500, 256) for _ in range(4)]
    bound_s = 8000 * 200 * (30e-6 + 6e-3 / 256) / 4
    efficiency = compute_efficiency(speeds, bound_s / 0.9)
    assert efficiency is not None and efficiency.fraction == pytest.approx(0.9, rel=0.01)


def test_the_efficiency_is_the_bound_over_the_time() -> None:
    samples = sample_steps(6e-3, 30e-6, [1, 64, 128, 256] * 10)
    speeds = [RankSpeed(samples, [200] * 500, [4.0] * 500, 256) for _ in range(4)]
    bound_s = 8000 * 200 * (30e-6 + 6e-3 / 256) / 4
    efficiency = compute_efficiency([*speeds, RankSpeed()], bound_s / 0.9)
    assert efficiency is not None and efficiency.fraction == pytest.approx(0.9, rel=1e-3)
    assert not efficiency.is_longest_row and efficiency.bound_s == pytest.approx(bound_s, rel=1e-3)
    shorter = compute_efficiency(speeds, bound_s / 2)
    assert shorter is not None and shorter.fraction == 1.0, "costs are means"
    assert shorter.bound_s == shorter.generation_s, "no rows are said to take more than they took"
    speeds.append(RankSpeed(StepSamples(), [9000], [1.0], 256))
    by_row = compute_efficiency(speeds, 60.0)
    assert by_row is not None and by_row.is_longest_row and by_row.longest_row_s == pytest.approx(9000 * 6.03e-3)
