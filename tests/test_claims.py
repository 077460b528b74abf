"""Claims: each position once, whatever the ranks' speeds, and help for the fullest shard."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dpgen.claims import Claims
from dpgen.collectives import LocalStore


def claims_of(sizes: list[int], *, steal: bool = True, max_rows: int = 8) -> list[Claims]:
    store = LocalStore()
    return [Claims(store, "run", sizes, rank, steal=steal, max_rows=max_rows) for rank in range(len(sizes))]


@pytest.mark.parametrize("seed", range(20))
def test_every_position_is_claimed_once_at_any_interleaving(seed: int) -> None:
    choose = random.Random(seed)
    sizes = [choose.choice([0, 1, 3, 50, 200]) for _ in range(choose.randint(1, 6))]
    ranks = claims_of(sizes)
    busy = list(ranks)
    seen: Counter[tuple[int, int]] = Counter()
    while busy:
        one = choose.choice(busy)
        claim = one.take()
        if claim is None:
            busy.remove(one)
        else:
            seen.update((claim.shard, position) for position in range(claim.start, claim.stop))
    assert seen == Counter((shard, position) for shard, size in enumerate(sizes) for position in range(size))


def test_without_stealing_a_rank_takes_its_own_shard_alone() -> None:
    ranks = claims_of([5, 20], steal=False)
    while (claim := ranks[0].take()) is not None:
        assert claim.shard == 0
    assert ranks[1].take() is not None


def test_the_fullest_shard_is_helped_first() -> None:
    ranks = claims_of([0, 10, 90])
    claim = ranks[0].take()
    assert claim is not None and claim.shard == 2


def test_claims_shrink_towards_the_end() -> None:
    ranks = claims_of([1000], max_rows=64)
    sizes = []
    while (claim := ranks[0].take()) is not None:
        sizes.append(claim.stop - claim.start)
    assert sizes[0] == 64 and sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_no_claim_once_there_are_none() -> None:
    ranks = claims_of([1, 0])
    assert ranks[1].take() is not None
    assert ranks[0].take() is None
    assert ranks[1].take() is None
