"""Noticing a lost rank and a lost store, without processes; tests/jobs/test_hosts.py has real ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
from helpers.clock import FakeClock
from helpers.jobs import wait_for

from dpgen.distributed.gloo.leases import Leases, LeaseTiming, read_lease_timing
from dpgen.distributed.gloo.timeout_store import TimeoutStore
from dpgen.distributed.group import InMemoryStore, SingleRankGroup
from dpgen.errors import ConfigError


class PausableStore(InMemoryStore):
    """Answer only while `answers` is set; fail for the key "broken"."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()
        self.answers.set()

    def add(self, key: str, amount: int) -> int:
        self.answers.wait()
        if key == "broken":
            raise RuntimeError("connection reset")
        return super().add(key, amount)


@pytest.fixture
def store() -> Iterator[PausableStore]:
    pausable = PausableStore()
    yield pausable
    pausable.answers.set()


def test_a_store_that_stops_answering_is_abandoned_for_good(store: PausableStore) -> None:
    timeout_store = TimeoutStore(store, limit_s=0.1)
    assert timeout_store.add("rows", 3) == 3
    store.answers.clear()
    with pytest.raises(RuntimeError, match="has not answered"):
        timeout_store.add("rows", 1)
    store.answers.set()
    with pytest.raises(RuntimeError, match="has not answered"):
        timeout_store.add("rows", 1)


def test_an_error_of_the_store_itself_is_raised_and_later_calls_work(store: PausableStore) -> None:
    timeout_store = TimeoutStore(store, limit_s=10)
    with pytest.raises(RuntimeError, match="connection reset"):
        timeout_store.add("broken", 1)
    assert timeout_store.add("rows", 1) == 1


def test_a_rank_whose_main_thread_is_stuck_counts_as_lost_until_its_next_heartbeat() -> None:
    store, clock = InMemoryStore(), FakeClock()
    own = Leases(store, store, 1, timing=LeaseTiming(interval_s=0.01), clock=clock)

    def count_renewals() -> int:
        return store.add("dpgen/lease/1", 0)

    def is_renewed() -> bool:
        before = count_renewals()
        threading.Event().wait(0.1)
        return count_renewals() > before

    wait_for(lambda: count_renewals() > 2)
    own.heartbeat()
    clock.now_s = 299
    assert is_renewed()
    clock.now_s = 301
    assert not is_renewed(), "the last heartbeat is more than 300 s old"
    peer = Leases(store, store, 0, timing=LeaseTiming(interval_s=1000), clock=clock)
    assert peer.find_expired([1], 60) == [], "this peer has only begun to watch"
    clock.now_s += 60
    assert peer.find_expired([1], 60) == [1]
    own.heartbeat()
    wait_for(is_renewed)
    clock.now_s += 5
    assert peer.find_expired([1], 60) == []
    own.enter_phase(is_slow=True)
    clock.now_s += 7_199
    assert is_renewed(), "a step of a slow phase may take two hours"
    clock.now_s += 2
    assert not is_renewed()
    own.enter_phase()
    clock.now_s += 301
    assert not is_renewed(), "the next phase has the usual limit again"
    own.stop()
    peer.stop()


def test_a_rank_that_stays_stuck_ends_itself_once_the_others_have_noticed() -> None:
    store, clock, ended = InMemoryStore(), FakeClock(), threading.Event()
    leases = Leases(store, store, 0, timing=LeaseTiming(interval_s=0.01), end_process=ended.set, clock=clock)
    leases.enter_phase()
    clock.now_s = 300 + 60 + 30
    assert not ended.wait(0.2), "the other ranks give it up first"
    clock.now_s = 300 + 120 + 1
    assert ended.wait(30)


class CountingStore(InMemoryStore):
    """Count the requests."""

    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0

    def add(self, key: str, amount: int) -> int:
        self.num_requests += 1
        return super().add(key, amount)

    def get_many(self, keys: Sequence[str]) -> list[int]:
        self.num_requests += 1
        return super().get_many(keys)


def test_rank_0_asks_for_all_leases_in_one_request_and_every_five_seconds_at_most() -> None:
    store, clock = CountingStore(), FakeClock()
    leases = [Leases(store, store, rank, timing=LeaseTiming(interval_s=1000), clock=clock) for rank in range(100)]
    store.num_requests = 0
    expired: list[int] = []
    for _ in range(120):  # looks of a minute
        expired += leases[0].find_expired(range(100), 60)
        clock.now_s += 0.5
    assert store.num_requests == 12
    assert expired == []
    assert leases[0].find_expired(range(100), 60) == list(range(100)), "none was renewed for a minute"
    assert leases[0].find_expired(range(99), 60) == list(range(99)), "other members are looked at immediately"
    for lease in leases:
        lease.stop()


def test_a_rank_that_waits_long_for_its_nodes_leader_asks_the_store_once_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class SecondOfNode(SingleRankGroup):
        rank, size = 1, 2

    group, store, clock = SecondOfNode(), CountingStore(), FakeClock()
    group.store, group.nodes = store, ["node", "node"]

    def sleep(seconds: float) -> None:
        clock.now_s += seconds
        if clock.now_s > 100:
            store.add("dpgen/node_ready/0.1/node", 1)

    monkeypatch.setattr("dpgen.distributed.group.time.sleep", sleep)
    with group.node_leader_first():
        assert 100 < store.num_requests < 115
        assert 100 < clock.now_s < 102


class RankOfNode(SingleRankGroup):
    """One of three ranks of a node, by a store that they share."""

    size = 3
    num_shrinks = 0  # type: ignore[assignment]

    def __init__(self, rank: int, store: InMemoryStore) -> None:
        super().__init__()
        self.rank, self.store, self.nodes = rank, store, ["node"] * 3


def test_the_second_rank_of_a_node_says_for_whom_it_waits(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpgen.log._FIRST_NOTICE_S", 0.0)
    for rank in (1, 2):
        RankOfNode(rank, InMemoryStore()).make_node_leader_log("to go first")()
    assert caplog.messages == ["waiting for rank 0, the first of node, to go first"], "once, and not by every rank"


def test_ranks_that_lost_a_peer_at_different_places_wait_for_the_same_leader_again() -> None:
    store = InMemoryStore()
    leader, follower = RankOfNode(0, store), RankOfNode(1, store)
    for _ in range(2):
        with leader.node_leader_first():
            pass
    with follower.node_leader_first():
        pass
    leader.num_shrinks = follower.num_shrinks = 1  # the follower has passed it once, the leader twice
    with leader.node_leader_first():
        passed = ["leader"]
    with follower.node_leader_first():
        passed.append("follower")
    assert passed == ["leader", "follower"], "the follower would wait for ever"


@pytest.mark.parametrize("text", ["4", "7.9", "soon", "nan", "inf", "-60"])
def test_a_lease_so_short_that_healthy_ranks_would_count_as_lost_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"DPGEN_LEASE_S={text}: must be a number of seconds, at least 8"):
        read_lease_timing({"DPGEN_LEASE_S": text})


def test_a_lease_lasts_a_minute_unless_a_test_shortens_it() -> None:
    assert [read_lease_timing({}).lease_s, read_lease_timing({"DPGEN_LEASE_S": "8"}).lease_s] == [60, 8]
    assert read_lease_timing({}).stuck_s == 300
