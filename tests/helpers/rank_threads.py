"""Ranks that are threads of one process: their collectives must pair up, or all of them fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from dpgen.distributed.codec import decode, encode
from dpgen.distributed.group import InMemoryStore, SingleRankGroup

T = TypeVar("T")

_TIMEOUT_S = 60.0


class ThreadGroup(SingleRankGroup):
    """Be one of several ranks, each of them a thread; see `run_ranks`."""

    def __init__(self, rank: int, nodes: Sequence[str], board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size, self.nodes = rank, len(nodes), list(nodes)
        self._board, self._barrier = board, barrier

    def _exchange(self, kind: str, value: Any) -> list[Any]:
        self._board[self.rank] = kind, value
        self._barrier.wait(_TIMEOUT_S)
        gathered = list(self._board)
        self._barrier.wait(_TIMEOUT_S)
        assert {name for name, _ in gathered} == {kind}, f"the ranks are in different collectives: {gathered}"
        return [gathered_value for _, gathered_value in gathered]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [decode(data) for data in self._exchange("all-gather", encode(value))]

    def gather_object(self, value: Any) -> list[Any] | None:
        values = [decode(data) for data in self._exchange("gather", encode(value))]
        return values if self.rank == 0 else None

    def all_reduce_any(self, mask: np.ndarray) -> np.ndarray:
        reduced: np.ndarray = np.logical_or.reduce(self._exchange("any", mask))
        return reduced


def run_ranks(action: Callable[[ThreadGroup], T], nodes: Sequence[str]) -> list[T]:
    """Return `action(group)` of each rank, by rank.

    Args:
        nodes: the node of each rank.
    """
    board, barrier, store = [None] * len(nodes), threading.Barrier(len(nodes)), InMemoryStore()

    def run(rank: int) -> T:
        group = ThreadGroup(rank, nodes, board, barrier)
        group.store = store
        try:
            return action(group)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(nodes)) as pool:
        running = [pool.submit(run, rank) for rank in range(len(nodes))]
        return [future.result() for future in running]
