"""Noticing a lost rank and a lost store, without processes; tests/jobs/test_hosts.py has real ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from helpers.clock import FakeClock
from helpers.jobs import wait_for

from dpgen.distributed.group import InMemoryStore
from dpgen.distributed.leases import Leases
from dpgen.distributed.timeout_store import TimeoutStore


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
    own = Leases(store, store, 1, interval_s=0.01, stuck_s=300, clock=clock)

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
    peer = Leases(store, store, 0, interval_s=1000, clock=clock)
    assert peer.find_expired([1], 60) == [], "this peer has only begun to watch"
    clock.now_s += 60
    assert peer.find_expired([1], 60) == [1]
    own.heartbeat()
    wait_for(is_renewed)
    assert peer.find_expired([1], 60) == []
    own.pause_heartbeat()
    clock.now_s += 10_000
    assert is_renewed(), "no heartbeat is expected during a pause"
    own.stop()
    peer.stop()
