"""Ranks that meet at a store which ranks of earlier rounds have used."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.jobs import wait_for

from dpgen.distributed.rendezvous import join_rendezvous
from dpgen.errors import JoinFailed


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
    store.set("dpgen/arrived/1", "token of a rank that was killed while it waited")
    store.set("dpgen/arrived/5", "token of a rank of a larger world")
    assert join_all(store, [0, 1, 2]) == {1}


def test_the_error_names_the_ranks_that_did_not_start() -> None:
    store = SharedStore()
    store.set("dpgen/arrived/2", "token of a rank that was killed")
    with pytest.raises(JoinFailed, match=r"2 of 3 ranks did not start within 0 s \(missing: 1, 2\)"):
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


def test_a_rank_whose_rank_0_never_answers_gives_up_resumable() -> None:
    with pytest.raises(JoinFailed, match=r"rank 0 did not answer rank 1 within 0 s") as raised:
        join_rendezvous(SharedStore(), 1, 2, timeout_s=0.1)
    assert raised.value.exit_status == 75
