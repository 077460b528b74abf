"""Ranks that gather around a store which other ranks have used before them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpgen.distributed.rendezvous import join_rendezvous
from dpgen.errors import DpgenError


class SharedStore:
    """The part of torch.distributed's Store that `join_rendezvous` uses."""

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


def gather(store: SharedStore, order: list[int]) -> set[int]:
    """The numbers that ranks find which come in this order."""
    with ThreadPoolExecutor(len(order)) as pool:
        return {
            each.result() for each in [pool.submit(join_rendezvous, store, rank, len(order), 10.0) for rank in order]
        }


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_each_gathering_has_a_number_of_its_own(order: list[int]) -> None:
    store = SharedStore()
    assert [gather(store, order) for _ in range(5)] == [{1}, {2}, {3}, {4}, {5}]


def test_what_a_rank_left_that_never_met_the_others_is_nobodys() -> None:
    store = SharedStore()
    store.set("dpgen/came/1", "a rank that was killed while it waited")
    store.set("dpgen/came/5", "one of a larger world")
    assert gather(store, [0, 1, 2]) == {1}


def test_ranks_that_do_not_come_are_named() -> None:
    store = SharedStore()
    store.set("dpgen/came/2", "killed")
    with pytest.raises(DpgenError, match="2 of 3 ranks have not come within 0 s: 1, 2"):
        join_rendezvous(store, 0, 3, timeout_s=0.1)
