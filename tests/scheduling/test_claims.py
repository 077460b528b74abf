"""Claims: each position once, whatever the ranks' speeds, and steals from the fullest shard."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from dpgen.distributed.group import InMemoryStore
from dpgen.scheduling.claims import ClaimPolicy, ShardClaimer


def make_claimers(
    sizes: list[int],
    *,
    steal: bool = True,
    max_size: int = 8,
    adaptive: bool = True,
    store: InMemoryStore | None = None,
) -> list[ShardClaimer]:
    """Make the claimers of all ranks, one per shard."""
    store = store or InMemoryStore()
    cursors = [f"cursor/{rank}" for rank in range(len(sizes))]
    for cursor in cursors:
        store.add(cursor, 0)
    policy = ClaimPolicy(steal=steal, max_size=max_size, adaptive=adaptive)
    return [ShardClaimer(store, cursors, sizes, rank, policy) for rank in range(len(sizes))]


@pytest.mark.parametrize("seed", range(20))
def test_every_position_is_claimed_once_at_any_interleaving(seed: int) -> None:
    choose = random.Random(seed)
    sizes = [choose.choice([0, 1, 3, 50, 200]) for _ in range(choose.choice([1, 2, 5, 6, 150]))]
    claimers = make_claimers(sizes)
    busy = list(claimers)
    positions: Counter[tuple[int, int]] = Counter()
    while busy:
        claimer = choose.choice(busy)
        if choose.random() < 0.1:  # a sync is at best a second old, and its number never too small
            claimer.num_remaining = sum(other.refresh_own_remaining() for other in claimers)
        claim = claimer.claim(64)
        if claim is None:
            busy.remove(claimer)
        else:
            positions.update((claim.shard, position) for position in range(claim.start, claim.stop))
    assert positions == Counter((shard, position) for shard, size in enumerate(sizes) for position in range(size))


def test_without_stealing_a_rank_claims_from_its_own_shard_only() -> None:
    claimers = make_claimers([5, 20], steal=False)
    while (claim := claimers[0].claim(64)) is not None:
        assert claim.shard == 0
    assert claimers[1].claim(64) is not None


def test_a_rank_steals_from_the_fullest_shard_first() -> None:
    claimers = make_claimers([0, 10, 90])
    claim = claimers[0].claim(64)
    assert claim is not None and claim.shard == 2


def test_a_slow_rank_sees_what_others_have_stolen_from_its_shard() -> None:
    slow, fast = make_claimers([100, 0], max_size=64)
    assert slow.claim(64) is not None and slow.refresh_own_remaining() == 75
    while fast.claim(64) is not None:
        pass
    assert slow.fair_claim_size == 25, "as of its last look at the cursor"
    assert slow.refresh_own_remaining() == 0


def test_a_slow_rank_yields_the_end_to_the_others() -> None:
    slow, *_ = make_claimers([1000, 1000, 1000])
    slow.num_remaining = 100
    assert not slow.should_yield(64)
    slow.slowdown = 1.5  # while one of its 64 rows finishes, the others finish 2 x 64 that they run, and 64 more
    assert not slow.should_yield(64)
    slow.num_remaining = 64
    assert not slow.should_yield(64), "as many as the others start meanwhile"
    slow.num_remaining = 63
    assert slow.should_yield(64)
    slow.num_remaining = 0  # nothing is left to yield: the rank must find out that it has no more work
    assert not slow.should_yield(64)
    slow.num_remaining, slow.slowdown = 10, 1.05
    assert not slow.should_yield(64), "that may be chance"
    alone, *_ = make_claimers([1000])
    alone.slowdown = 2.0
    assert not alone.should_yield(64)
    without_stealing, *_ = make_claimers([100, 100], steal=False)
    without_stealing.slowdown = 9.0
    assert not without_stealing.should_yield(64), "no other rank would claim them"


def test_a_stealing_rank_uses_what_it_sees_before_the_next_sync() -> None:
    fast, slow = make_claimers([0, 100], max_size=64)
    while slow.refresh_own_remaining() > 20:
        slow.claim(1)
    assert fast.num_remaining == 100, "as of the last sync"
    claim = fast.claim(64)
    assert claim is not None and claim.stop - claim.start == 5, "a quarter of the 20 that it found"
    assert fast.fair_claim_size == 5


def test_claims_shrink_towards_the_end() -> None:
    claimers = make_claimers([1000], max_size=64)
    sizes = []
    while (claim := claimers[0].claim(64)) is not None:
        sizes.append(claim.stop - claim.start)
    assert sizes[0] == 64 and sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_no_rank_gets_a_claim_once_all_shards_are_exhausted() -> None:
    claimers = make_claimers([1, 0])
    assert claimers[1].claim(64) is not None
    assert claimers[0].claim(64) is None
    assert claimers[1].claim(64) is None


def test_the_last_rows_are_claimed_one_by_one() -> None:
    claimers = make_claimers([100, 100, 100, 100], max_size=64)
    assert claimers[0].fair_claim_size == 50
    claimers[0].num_remaining = 20  # the other ranks have nearly finished
    claim = claimers[0].claim(64)
    assert claim is not None and claim.stop - claim.start == 2
    claimers[0].num_remaining = 5
    claim = claimers[0].claim(64)
    assert claim is not None and claim.stop - claim.start == 1
    assert claimers[0].fair_claim_size == 0


class CountingStore(InMemoryStore):
    """Count the calls to the store."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def add(self, key: str, amount: int) -> int:
        self.num_calls += 1
        return super().add(key, amount)

    def get_many(self, keys: Sequence[str]) -> list[int]:
        self.num_calls += 1
        return super().get_many(keys)


def test_a_thousand_ranks_make_few_calls_to_the_store() -> None:
    num_ranks, num_rows = 1024, 64
    store = CountingStore()
    claimers = make_claimers([num_rows] * num_ranks, max_size=64, store=store)
    store.num_calls = 0
    busy = list(range(num_ranks))
    random.Random(0).shuffle(busy)
    num_positions = 0
    while busy:
        for rank in list(busy):
            claim = claimers[rank].claim(64)
            if claim is None:
                busy.remove(rank)
            else:
                num_positions += claim.stop - claim.start
    assert num_positions == num_ranks * num_rows
    assert store.num_calls / num_ranks < 100, "reading every cursor on every rank would take 1,024"


def test_a_rank_that_is_ahead_steals_before_its_own_shard_is_exhausted() -> None:
    fast, slow = make_claimers([100, 100])
    shards = []
    while fast.num_remaining > 100:
        claim = fast.claim(8)
        assert claim is not None
        shards.append(claim.shard)
        fast.num_remaining -= claim.stop - claim.start
    assert 1 in shards and fast.refresh_own_remaining() > 20
    assert abs(fast.refresh_own_remaining() - slow.refresh_own_remaining()) < 50


@pytest.mark.parametrize(("num_own", "is_ahead"), [(72, False), (71, True)])
def test_a_rank_is_ahead_by_a_fifth_of_the_mean_and_eight_positions(num_own: int, is_ahead: bool) -> None:
    claimer, _ = make_claimers([num_own, 200 - num_own])  # the mean is 100
    claim = claimer.claim(64)
    assert claim is not None and claim.shard == int(is_ahead)


def test_ranks_that_are_about_equally_far_do_not_look_at_each_others_shards() -> None:
    store = CountingStore()
    first, second = make_claimers([95, 105], store=store)
    store.num_calls = 0
    for claimer in (first, second):
        assert claimer.claim(64) is not None
    assert store.num_calls == 2, "one add to the own cursor each"


def test_a_rank_that_is_ahead_steals_from_no_shard_that_holds_less_than_its_own() -> None:
    store = CountingStore()
    ahead, other = make_claimers([20, 20], store=store)
    while other.refresh_own_remaining() > 4:
        other.claim(1)
    ahead.num_remaining = 100  # a sync that is out of date makes it seem ahead
    claim = ahead.claim(64)
    assert claim is not None and claim.shard == 0


def test_a_cursor_is_read_only_where_another_rank_may_have_moved_it() -> None:
    store = CountingStore()
    alone, _ = make_claimers([10, 10], steal=False, store=store)
    exhausted, _ = make_claimers([0, 10], store=store)
    store.num_calls = 0
    assert alone.refresh_own_remaining() == 10 and exhausted.refresh_own_remaining() == 0
    assert store.num_calls == 0
    shared, _ = make_claimers([10, 10], store=store)
    store.num_calls = 0
    assert shared.refresh_own_remaining() == 10 and store.num_calls == 1


def test_a_cursor_beyond_the_end_of_its_shard_leaves_nothing() -> None:
    store = InMemoryStore()
    first, second = make_claimers([10, 0], store=store)
    store.add("cursor/0", 13)  # each rank that finds nothing more has moved it
    assert first.refresh_own_remaining() == 0
    assert first.claim(64) is None and second.claim(64) is None


def test_a_steal_is_sized_by_the_probed_shards_where_there_are_too_many_to_read() -> None:
    store = CountingStore()
    claimer, *others = make_claimers([0] + [40] * 150, max_size=64, store=store)
    for other in others:
        while other.refresh_own_remaining() > 20:
            other.claim(1)
    claimer.num_remaining = 10_000_000  # a sync that is out of date
    store.num_calls = 0
    claim = claimer.claim(64)
    assert claim is not None and store.num_calls == 2, "one call reads the probed shards, one claims"
    assert claim.stop - claim.start == 150 * 20 // (2 * 151)


def test_groups_are_stolen_only_once_the_own_shard_is_exhausted() -> None:
    claimer, _ = make_claimers([20, 20], max_size=1, adaptive=False)
    claimer.slowdown = 5.0
    assert not claimer.should_yield(1000)
    shards = []
    while (claim := claimer.claim(64)) is not None:
        shards.append(claim.shard)
        claimer.num_remaining -= 1
    assert shards == [0] * 20 + [1] * 20
