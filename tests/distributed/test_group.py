"""What notices that a rank, or the store's host, is no more: without processes (tests/jobs/test_hosts.py
has real ones)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from helpers.jobs import wait_for

from dpgen.distributed.group import InMemoryStore
from dpgen.distributed.leases import Leases
from dpgen.distributed.timeout_store import TimeoutStore


class SilentStore(InMemoryStore):
    """Answers until it is told to be silent."""

    def __init__(self) -> None:
        super().__init__()
        self.speaks = threading.Event()
        self.speaks.set()

    def add(self, key: str, amount: int) -> int:
        self.speaks.wait()
        if key == "broken":
            raise RuntimeError("connection reset")
        return super().add(key, amount)


@pytest.fixture
def store() -> Iterator[SilentStore]:
    silent = SilentStore()
    yield silent
    silent.speaks.set()


def test_a_silent_store_is_given_up_once_and_for_all(store: SilentStore) -> None:
    watched = TimeoutStore(store, limit_s=0.1)
    assert watched.add("rows", 3) == 3
    store.speaks.clear()
    with pytest.raises(RuntimeError, match="has not answered"):
        watched.add("rows", 1)
    store.speaks.set()
    with pytest.raises(RuntimeError, match="has not answered"):
        watched.add("rows", 1)


def test_the_stores_own_error_is_raised(store: SilentStore) -> None:
    watched = TimeoutStore(store, limit_s=10)
    with pytest.raises(RuntimeError, match="connection reset"):
        watched.add("broken", 1)
    assert watched.add("rows", 1) == 1


class FakeClock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_rank_whose_main_thread_is_stuck_counts_as_lost_until_it_beats_again() -> None:
    store, watch = InMemoryStore(), FakeClock()
    own = Leases(store, store, 1, interval_s=0.01, stuck_s=300, clock=watch)

    def renewals() -> int:
        return store.add("dpgen/lease/1", 0)

    def is_renewed() -> bool:
        before = renewals()
        threading.Event().wait(0.1)
        return renewals() > before

    wait_for(lambda: renewals() > 2)  # before the first beat nothing is expected of it
    own.heartbeat()
    watch.now_s = 299
    assert is_renewed()
    watch.now_s = 301
    assert not is_renewed()
    others = Leases(store, store, 0, interval_s=1000, clock=watch)
    assert others.find_expired([1], 60) == []
    watch.now_s += 60
    assert others.find_expired([1], 60) == [1]
    own.heartbeat()
    wait_for(is_renewed)
    assert others.find_expired([1], 60) == []
    own.pause_heartbeat()
    watch.now_s += 10_000
    assert is_renewed()
    own.stop()
    others.stop()
