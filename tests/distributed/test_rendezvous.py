"""Ranks that meet at a store which ranks of earlier rounds have used."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpgen.distributed.rendezvous import join_rendezvous
from dpgen.errors import DpgenError


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
    with pytest.raises(DpgenError, match=r"2 of 3 ranks did not start within 0 s \(missing: 1, 2\)"):
        join_rendezvous(store, 0, 3, timeout_s=0.1)
