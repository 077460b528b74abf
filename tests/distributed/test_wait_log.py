"""Naming the ranks that keep the others waiting, without processes; tests/jobs/test_rank_startup.py has real ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
from helpers.clock import FakeClock

from dpgen.distributed.gloo.wait_log import WaitLog


class CountedStore:
    """Hold text by key, and count the requests."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.num_requests = 0

    def set(self, key: str, value: str) -> None:
        self.set_many({key: value})

    def set_many(self, values: dict[str, str]) -> None:
        self.num_requests += 1
        self.values |= values

    def check(self, keys: Sequence[str]) -> bool:
        self.num_requests += 1
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        self.num_requests += 1
        return self.values[key].encode()

    def get_many(self, keys: Sequence[str]) -> list[int]:
        self.num_requests += 1
        return [int(self.values[key]) for key in keys]

    def add(self, key: str, amount: int) -> int:
        self.num_requests += 1
        self.values[key] = str(int(self.values.get(key, "0")) + amount)
        return int(self.values[key])


def make_logs(store: CountedStore, clock: FakeClock, ranks: Sequence[int], size: int) -> list[WaitLog]:
    logs = [WaitLog(store, rank, lambda: list(range(size)), clock) for rank in ranks]
    for log in logs:
        log.begin_epoch(0)
    return logs


def test_rank_0_finds_out_who_of_a_thousand_ranks_is_missing_by_a_few_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    store, clock = CountedStore(), FakeClock()
    logs = make_logs(store, clock, range(1000), 1000)
    logs[7].set_phase("loading the model")
    waits = [log.start() for rank, log in enumerate(logs) if rank != 7]
    clock.now_s += 6
    for on_wait in waits:
        on_wait()
    clock.now_s += 6
    store.num_requests = 0
    waits[0]()
    assert caplog.messages == ["waiting for 1 of 1,000 ranks: rank 7 (loading the model)"]
    assert store.num_requests == 3, "all notes, and the phase of the one that is named"


def test_one_rank_warns_where_rank_0_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    store, clock = CountedStore(), FakeClock()
    logs = make_logs(store, clock, range(3), 3)
    waits = [log.start() for log in logs[1:]]
    for _ in range(2):
        clock.now_s += 6
        for on_wait in waits:
            on_wait()
    assert caplog.messages == ["waiting for rank 0 (starting)"]


def test_a_note_of_an_earlier_group_counts_for_nothing_after_a_loss(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store, clock = CountedStore(), FakeClock()
    logs = make_logs(store, clock, range(2), 2)
    for _ in range(9):
        on_wait = logs[1].start()
    clock.now_s += 6
    on_wait()
    for log in logs:
        log.begin_epoch(1)
    on_wait = logs[0].start()
    clock.now_s += 12
    on_wait()
    assert caplog.messages == ["waiting for 1 of 2 ranks: rank 1 (starting)"]


def test_a_rank_knows_for_how_long_it_has_waited() -> None:
    store, clock = CountedStore(), FakeClock(100.0)
    _, log = make_logs(store, clock, [0, 1], 2)
    assert log.wait_s == 0
    on_wait = log.start()
    for second in range(21):
        clock.now_s = 100.0 + second
        on_wait()
    assert log.wait_s == 20
    clock.now_s += 5  # the collective is complete, and the rank works
    assert log.wait_s == 0
