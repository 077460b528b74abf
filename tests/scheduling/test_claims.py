"""Claims: each position once, whatever the ranks' speeds, and help for the fullest shard."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from dpgen.distributed.group import InMemoryStore
from dpgen.scheduling.claims import ShardClaimer


def claims_of(sizes: list[int], *, steal: bool = True, max_size: int = 8) -> list[ShardClaimer]:
    store = InMemoryStore()
    cursors = [f"cursor/{rank}" for rank in range(len(sizes))]
    for cursor in cursors:
        store.add(cursor, 0)
    return [ShardClaimer(store, cursors, sizes, rank, steal=steal, max_size=max_size) for rank in range(len(sizes))]


@pytest.mark.parametrize("seed", range(20))
def test_every_position_is_claimed_once_at_any_interleaving(seed: int) -> None:
    choose = random.Random(seed)
    sizes = [choose.choice([0, 1, 3, 50, 200]) for _ in range(choose.choice([1, 2, 5, 6, 150]))]
    ranks = claims_of(sizes)
    busy = list(ranks)
    seen: Counter[tuple[int, int]] = Counter()
    while busy:
        one = choose.choice(busy)
        if choose.random() < 0.1:  # what the ranks agree on is of a second ago at best, and never too little
            one.num_remaining = sum(each.refresh_own_remaining() for each in ranks)
        claim = one.claim(64)
        if claim is None:
            busy.remove(one)
        else:
            seen.update((claim.shard, position) for position in range(claim.start, claim.stop))
    assert seen == Counter((shard, position) for shard, size in enumerate(sizes) for position in range(size))


def test_without_stealing_a_rank_takes_its_own_shard_alone() -> None:
    ranks = claims_of([5, 20], steal=False)
    while (claim := ranks[0].claim(64)) is not None:
        assert claim.shard == 0
    assert ranks[1].claim(64) is not None


def test_the_fullest_shard_is_helped_first() -> None:
    ranks = claims_of([0, 10, 90])
    claim = ranks[0].claim(64)
    assert claim is not None and claim.shard == 2


def test_a_slow_rank_sees_what_helpers_have_taken_from_its_shard() -> None:
    slow, quick = claims_of([100, 0], max_size=64)
    assert slow.claim(64) is not None and slow.refresh_own_remaining() == 75
    while quick.claim(64) is not None:
        pass
    assert slow.fair_claim_size == 25, "as far as it knows"
    assert slow.refresh_own_remaining() == 0


def test_a_slow_rank_leaves_the_end_to_the_others() -> None:
    slow, *_ = claims_of([1000, 1000, 1000])
    slow.num_remaining = 100
    assert not slow.should_yield(64)
    slow.slowdown = 1.5  # while one of its 64 rows is done, the others do 2 x 64 that they run, and 64 more
    assert not slow.should_yield(64)
    slow.num_remaining = 63
    assert slow.should_yield(64)
    slow.num_remaining = 0  # there is nothing to leave: it has to see that it is through
    assert not slow.should_yield(64)
    slow.num_remaining, slow.slowdown = 10, 1.05
    assert not slow.should_yield(64), "that may be chance"
    alone, *_ = claims_of([1000])
    alone.slowdown = 2.0
    assert not alone.should_yield(64)
    plain, *_ = claims_of([100, 100], steal=False)
    plain.slowdown = 9.0
    assert not plain.should_yield(64), "nobody else would take them"


def test_a_helper_heeds_what_it_sees_before_the_ranks_agree_again() -> None:
    quick, slow = claims_of([0, 100], max_size=64)
    while slow.refresh_own_remaining() > 20:
        slow.claim(1)
    assert quick.num_remaining == 100, "of some time ago"
    claim = quick.claim(64)
    assert claim is not None and claim.stop - claim.start == 5, "a quarter of the 20 that it found"
    assert quick.fair_claim_size == 5


def test_claims_shrink_towards_the_end() -> None:
    ranks = claims_of([1000], max_size=64)
    sizes = []
    while (claim := ranks[0].claim(64)) is not None:
        sizes.append(claim.stop - claim.start)
    assert sizes[0] == 64 and sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_no_claim_once_there_are_none() -> None:
    ranks = claims_of([1, 0])
    assert ranks[1].claim(64) is not None
    assert ranks[0].claim(64) is None
    assert ranks[1].claim(64) is None


def test_what_little_is_left_is_taken_one_by_one() -> None:
    ranks = claims_of([100, 100, 100, 100], max_size=64)
    assert ranks[0].fair_claim_size == 50
    ranks[0].num_remaining = 20  # the others are nearly through
    claim = ranks[0].claim(64)
    assert claim is not None and claim.stop - claim.start == 2
    ranks[0].num_remaining = 5
    claim = ranks[0].claim(64)
    assert claim is not None and claim.stop - claim.start == 1
    assert ranks[0].fair_claim_size == 0


class CountingStore(InMemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def add(self, key: str, amount: int) -> int:
        self.num_calls += 1
        return super().add(key, amount)

    def get_many(self, keys: Sequence[str]) -> list[int]:
        self.num_calls += 1
        return super().get_many(keys)


def test_a_thousand_ranks_ask_the_store_little() -> None:
    num_ranks, num_rows = 1024, 64
    store, cursors = CountingStore(), [str(rank) for rank in range(num_ranks)]
    for cursor in cursors:
        store.add(cursor, 0)
    sizes = [num_rows] * num_ranks
    ranks = [ShardClaimer(store, cursors, sizes, rank, steal=True, max_size=64) for rank in range(num_ranks)]
    store.num_calls = 0
    busy = list(range(num_ranks))
    random.Random(0).shuffle(busy)
    num_positions = 0
    while busy:
        for rank in list(busy):
            claim = ranks[rank].claim(64)
            if claim is None:
                busy.remove(rank)
            else:
                num_positions += claim.stop - claim.start
    assert num_positions == num_ranks * num_rows
    assert store.num_calls / num_ranks < 100, "a look at every shard by every rank would be 1,024"


def test_a_shard_that_is_behind_is_helped_before_the_own_one_is_used_up() -> None:
    quick, slow = claims_of([100, 100])
    shards = []
    while quick.num_remaining > 100:
        claim = quick.claim(8)
        assert claim is not None
        shards.append(claim.shard)
        quick.num_remaining -= claim.stop - claim.start
    assert 1 in shards and quick.refresh_own_remaining() > 20
    assert abs(quick.refresh_own_remaining() - slow.refresh_own_remaining()) < 50


def test_groups_are_helped_only_when_the_own_ones_are_used_up() -> None:
    store, cursors = InMemoryStore(), ["0", "1"]
    for cursor in cursors:
        store.add(cursor, 0)
    claims = ShardClaimer(store, cursors, [20, 20], 0, steal=True, max_size=1, adaptive=False)
    claims.slowdown = 5.0
    assert not claims.should_yield(1000)
    taken = []
    while (claim := claims.claim(64)) is not None:
        taken.append(claim.shard)
        claims.num_remaining -= 1
    assert taken == [0] * 20 + [1] * 20
