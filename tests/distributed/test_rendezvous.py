"""Ranks that meet at a store which ranks of earlier rounds have used."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.jobs import wait_for

from dpgen.distributed.rendezvous import Departure, join_rendezvous, read_join_timeout
from dpgen.errors import ConfigError, JoinFailed, PeerFailed


class SharedStore:
    """Implement the part of torch.distributed's Store that `join_rendezvous` uses."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout=10):
                raise RuntimeError("wait timeout")
            return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def set_many(self, values: dict[str, str]) -> None:
        for key, value in values.items():
            self.set(key, value)

    def append(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = self._values.get(key, b"") + value.encode()

    def add(self, key: str, amount: int) -> int:
        with self._changed:
            self._values[key] = str(int(self._values.get(key, b"0")) + amount).encode()
            return int(self._values[key])


def join_all(store: SharedStore, order: list[int]) -> set[int]:
    """Let the ranks join in this order, and return the round numbers that they receive."""
    with ThreadPoolExecutor(len(order)) as pool:
        joining = [pool.submit(join_rendezvous, store, rank, len(order), 10.0) for rank in order]
        return {future.result() for future in joining}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_all_ranks_of_a_round_receive_the_same_new_number(order: list[int]) -> None:
    store = SharedStore()
    assert [join_all(store, order) for _ in range(5)] == [{1}, {2}, {3}, {4}, {5}]


def test_a_token_left_by_a_rank_that_never_joined_is_ignored() -> None:
    store = SharedStore()
    store.append("dpgen/arrived", "1 token of a rank that was killed while it waited\n")
    store.append("dpgen/arrived", "5 token of a rank of a larger world\n")
    assert join_all(store, [0, 1, 2]) == {1}


def test_the_error_names_the_ranks_that_did_not_start() -> None:
    store = SharedStore()
    store.append("dpgen/arrived", "2 token of a rank that was killed\n")
    with pytest.raises(JoinFailed, match=r"2 of 3 ranks did not start within 0.1 s \(.*missing: 1, 2\)"):
        join_rendezvous(store, 0, 3, timeout_s=0.1)


def test_a_rank_without_rank_0_says_whom_it_waits_for_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpgen.log._FIRST_NOTICE_S", 0.0)
    caplog.set_level(logging.INFO)
    store = SharedStore()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(join_rendezvous, store, 1, 2, 10.0, "RANK=1, WORLD_SIZE=2")]
        wait_for(lambda: bool(caplog.messages))
        waiting.append(pool.submit(join_rendezvous, store, 0, 2, 10.0, "RANK=0, WORLD_SIZE=2"))
        assert {future.result() for future in waiting} == {1}
    assert caplog.messages[0] == "waiting for rank 0 to start: it has not answered rank 1 (RANK=1, WORLD_SIZE=2)"
    assert caplog.records[0].levelno == logging.WARNING, "so that ranks other than 0 say it, too"
    assert caplog.messages[1:] == ["waiting for 1 of 2 ranks to start (missing: 1) (RANK=0, WORLD_SIZE=2)"]


def test_no_rank_goes_on_before_all_have_started(caplog: pytest.LogCaptureFixture) -> None:
    store, round_known = SharedStore(), threading.Event()
    with ThreadPoolExecutor(3) as pool:
        early = [
            pool.submit(join_rendezvous, store, 0, 3, 10.0),
            pool.submit(join_rendezvous, store, 1, 3, 10.0, on_round=lambda round_id: round_known.set()),
        ]
        assert round_known.wait(10)
        assert not any(future.done() for future in early), "it would connect to a rank that does not exist"
        late = pool.submit(join_rendezvous, store, 2, 3, 10.0)
        assert [future.result() for future in [*early, late]] == [1, 1, 1]


def test_ranks_that_wait_for_one_that_never_starts_end_with_rank_0_and_leave_the_report_to_it() -> None:
    store = SharedStore()
    with ThreadPoolExecutor(2) as pool:
        joining = [pool.submit(join_rendezvous, store, rank, 3, 0.5) for rank in range(2)]
        errors = [future.exception() for future in joining]
    assert isinstance(errors[0], JoinFailed) and "missing: 2" in str(errors[0]) and errors[0].exit_status == 75
    assert type(errors[1]) is PeerFailed and errors[1].exit_status == 75 and str(errors[1]) == str(errors[0])


def test_a_rank_that_leaves_while_others_join_ends_them_at_once() -> None:
    store, departure, joined = SharedStore(), Departure(), threading.Semaphore(0)

    def join(rank: int) -> int:
        def on_round(round_id: int) -> None:
            if rank == 1:
                departure.prepare(lambda: store, rank, round_id)
            joined.release()

        return join_rendezvous(store, rank, 4, 60.0, on_round=on_round)

    with ThreadPoolExecutor(3) as pool:
        joining = [pool.submit(join, rank) for rank in range(3)]
        assert all(joined.acquire(timeout=10) for _ in joining)
        departure.announce("interrupted by SIGTERM")
        errors = [future.exception(30) for future in joining]
    message = "rank 1 left while the ranks joined: interrupted by SIGTERM"
    assert [str(error) for error in errors] == [message] * 3, "although rank 3 never starts"
    assert [getattr(error, "exit_status", None) for error in errors] == [75] * 3


def test_rank_0_that_leaves_while_others_join_ends_them_at_once() -> None:
    store, departure = SharedStore(), Departure()
    with ThreadPoolExecutor(2) as pool:
        joining = [pool.submit(join_rendezvous, store, rank, 4, 60.0) for rank in (1, 2)]
        arrived: list[str] = []
        while len(arrived) < 2:
            arrived = store.get("dpgen/arrived").decode().splitlines() if store.check(["dpgen/arrived"]) else []
        for line in arrived:
            store.set(f"dpgen/ack/{line.partition(' ')[2]}", "1")
        departure.prepare(lambda: store, 0, 1)
        departure.announce("interrupted by SIGTERM")
        errors = [future.exception(30) for future in joining]
    message = "rank 0 left while the ranks joined: interrupted by SIGTERM"
    assert [(type(error), str(error)) for error in errors] == [(PeerFailed, message)] * 2


def test_a_rank_that_leaves_without_a_store_ends_all_the_same() -> None:
    departure, num_tries = Departure(), 0

    def fail() -> SharedStore:
        nonlocal num_tries
        num_tries += 1
        raise RuntimeError("Connection refused")

    departure.announce("before it has a store")
    departure.prepare(fail, 1, 1)
    departure.announce("once the store is gone")
    assert num_tries == 1


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_limit_for_joining_that_is_no_time_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match=f"DPGEN_JOIN_TIMEOUT_S={text}: must be a number of seconds"):
        read_join_timeout({"DPGEN_JOIN_TIMEOUT_S": text})


def test_ranks_wait_half_an_hour_for_each_other_unless_told_otherwise() -> None:
    assert [read_join_timeout(environ) for environ in ({}, {"DPGEN_JOIN_TIMEOUT_S": "90"})] == [1800, 90]


def test_a_rank_whose_rank_0_never_answers_gives_up_resumable() -> None:
    with pytest.raises(JoinFailed, match=r"rank 0 did not answer rank 1 within 0.1 s") as raised:
        join_rendezvous(SharedStore(), 1, 2, timeout_s=0.1)
    assert raised.value.exit_status == 75


class PromptRanks(SharedStore):
    """Ranks that have arrived, and confirm each reply immediately; rank 0's requests are counted."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_requests = 0
        self._values["dpgen/arrived"] = b"".join(b"%d token-%d\n" % (rank, rank) for rank in range(1, size))

    def check(self, keys: list[str]) -> bool:
        self.num_requests += 1
        return super().check(keys)

    def get(self, key: str) -> bytes:
        self.num_requests += 1
        return super().get(key)

    def set_many(self, values: dict[str, str]) -> None:
        self.num_requests += 1
        tokens = [key.rpartition("/")[2] for key in values]
        self._values["dpgen/confirm/1"] = "".join(f"{token[6:]} {token}\n" for token in tokens).encode()

    def set(self, key: str, value: str) -> None:
        self.num_requests += 1


def test_rank_0_asks_a_few_times_for_a_thousand_ranks() -> None:
    store = PromptRanks(1000)
    assert join_rendezvous(store, 0, 1000, 10.0) == 1
    assert store.num_requests == 7, "two values are read; one request replies to all, one ends the round"
