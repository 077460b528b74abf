"""Agreeing on the ranks that remain after a loss, without processes; tests/jobs/test_losses.py has real ones."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from dpgen.distributed.gloo.leases import Leases
from dpgen.distributed.gloo.membership import Membership
from dpgen.distributed.group import StorePoll


class CountedStore:
    """Hold text by key, and count the requests."""

    def __init__(self, **values: str) -> None:
        self.values, self.num_requests = values, 0

    def check(self, keys: list[str]) -> bool:
        self.num_requests += 1
        return all(key in self.values for key in keys)

    def set(self, key: str, value: str) -> None:
        self.num_requests += 1
        self.values[key] = value

    def append(self, key: str, value: str) -> None:
        self.num_requests += 1
        self.values[key] = self.values.get(key, "") + value

    def get(self, key: str) -> bytes:
        self.num_requests += 1
        return self.values[key].encode()


class FewExpired:
    """Stand in for leases of which these have expired."""

    def __init__(self, expired: list[int]) -> None:
        self.expired = expired

    def find_expired(self, members: list[int], limit_s: float) -> list[int]:
        return self.expired


def shrink(store: Any, rank: int, size: int, expired: list[int]) -> list[int]:
    leases = cast(Leases, FewExpired(expired))
    return Membership(store, leases, rank, size, broken_lease_s=15.0, on_wait=lambda: None).shrink()


def test_rank_0_learns_by_a_few_requests_who_of_a_thousand_ranks_remain() -> None:
    entered = " ".join(str(rank) for rank in range(999, 0, -1) if rank != 7) + " "
    store = CountedStore(**{"dpgen/shrink/1/entered": entered})
    members = shrink(store, 0, 1000, [7])
    assert members == [rank for rank in range(1000) if rank != 7]
    assert json.loads(store.values["dpgen/shrink/1/members"]) == members
    assert store.num_requests == 4


def test_a_rank_that_entered_and_then_lost_its_lease_is_a_member_until_the_next_loss() -> None:
    store = CountedStore(**{"dpgen/shrink/1/entered": "1 2 "})
    assert shrink(store, 0, 3, [2]) == [0, 1, 2]


def test_the_others_take_the_members_that_rank_0_publishes() -> None:
    store = CountedStore(**{"dpgen/shrink/1/members": "[0, 2]"})
    assert shrink(store, 2, 3, []) == [0, 2]
    assert store.values["dpgen/shrink/1/entered"] == "2 "


@pytest.mark.parametrize(("num_ranks", "most_s"), [(2, 1.0), (1000, 1.0), (4096, 4.096)])
def test_waiting_ranks_ask_the_store_a_thousand_times_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, most_s: float
) -> None:
    sleeps_s: list[float] = []
    monkeypatch.setattr("dpgen.distributed.group.time.sleep", sleeps_s.append)
    poll = StorePoll(num_ranks)
    for _ in range(30):
        poll.sleep()
    assert sleeps_s[0] == 0.02, "a short wait ends soon"
    assert sleeps_s == sorted(sleeps_s)
    assert sleeps_s[-1] == pytest.approx(most_s)
