"""The ranks' conversation: a gloo group and its c10d store behind one small interface, or a world of one.

Callers never ask which it is. Three rules keep a large job from hanging:

* a collective that may have to wait for a slow rank is asynchronous (`Group.reduce` gives a `PendingReduce`), and whoever
  waits keeps asking whether a peer has failed;
* the collectives have no 30-minute limit: slow ranks are waited for, dead ones are noticed by their closed
  connections and by the failure that a dying rank leaves in the store;
* the first rank to fail says why, the others only end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

from dpgen.distributed.topology import Topology
from dpgen.errors import EXIT_RESUMABLE, DpgenError, PeerFailed

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

_POLL_S = 0.02


class PendingReduce(Protocol):
    """A collective under way."""

    def done(self) -> bool:
        """Whether the result is there.

        Raises:
            PeerFailed: it never will be.
        """

    def result(self) -> list[int]:
        """The reduced numbers; only once `done`."""


class CounterStore(Protocol):
    """The part of c10d's Store that claims need: named counters."""

    def add(self, key: str, amount: int) -> int:
        """Adds atomically, from 0, and gives the sum."""

    def get_many(self, keys: Sequence[str]) -> list[int]:
        """The counters of these names, all of which exist, in one question."""


class RankGroup(ABC):
    """All ranks of the job, seen from one of them."""

    rank: int
    size: int
    nodes: list[str]  # the node of each rank
    store: CounterStore
    can_shrink = False  # whether the launcher lets ranks go on without one that was lost

    @property
    def checked_store(self) -> CounterStore:
        """The store, for whoever is not to know how it fails: its errors are PeerFailed, as the group's are."""
        return self.store

    @property
    def is_node_leader(self) -> bool:
        """Whether this rank does what is to be done once a node."""
        return self.nodes.index(self.nodes[self.rank]) == self.rank

    @abstractmethod
    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        """Starts an element-wise all-reduce of whole numbers (int64) over all ranks."""

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""

    @abstractmethod
    def gather_object(self, value: Any) -> list[Any] | None:
        """Every rank's value, by rank, on rank 0; None elsewhere."""

    @abstractmethod
    def all_reduce_any(self, mask: np.ndarray) -> np.ndarray:
        """Element-wise "any rank has it" over boolean arrays of one shape."""

    @property
    def num_shrinks(self) -> int:
        """How often the ranks have gone on without some that were lost; the same on all of them."""
        return 0

    @abstractmethod
    def all_reduce_sum(self, counts: np.ndarray) -> np.ndarray:
        """Element-wise sums over int64 arrays of one shape."""

    @abstractmethod
    def raise_if_peer_failed(self) -> None:
        """Raises PeerFailed if another rank has announced that it failed."""

    @abstractmethod
    def announce_failure(self, message: str, exit_status: int) -> bool:
        """Tells the other ranks that this one failed; True if it was the first to, and so is the one to say why."""

    @abstractmethod
    def first_failure_status(self) -> int | None:
        """The exit status of the failure that was announced first; None where none was, or nobody can tell any more."""

    @abstractmethod
    def shrink(self) -> None:
        """Goes on without the ranks that were lost, if it can; all that are left call it. `rank`, `size` may change.

        Raises:
            PeerFailed: that can't be done, or this rank is one that the others gave up.
        """

    @abstractmethod
    def heartbeat(self) -> None:
        """Says that this rank goes round its loop. Once it stops saying so, for minutes, it is lost; see `rest`."""

    @abstractmethod
    def pause_heartbeat(self) -> None:
        """Says that no `beat` is to be expected: what comes may take any time."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the group; safe to call twice."""

    def wait(self, pending: PendingReduce, on_wait: Callable[[], None] = lambda: None) -> list[int]:
        """Waits for a collective, however long the slowest rank takes.

        Args:
            while_waiting: called again and again.

        Raises:
            PeerFailed: a rank failed meanwhile.
        """
        while not pending.done():
            on_wait()
            time.sleep(_POLL_S)
        return pending.result()

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Runs `action` here, and raises on every rank if it raised on any: an error is said once, not once a rank.

        Raises:
            DpgenError: this rank's own error, where it is the lowest rank that has one.
            PeerFailed: another rank's.
        """
        error: DpgenError | None = None
        value: T | None = None
        try:
            value = action()
        except DpgenError as raised:
            error = raised
        found = self.all_gather_object(None if error is None else (str(error), error.exit_status))
        failed = [rank for rank, each in enumerate(found) if each is not None]
        if not failed:
            return cast(T, value)
        if failed[0] == self.rank:
            assert error is not None
            raise error
        message, exit_status = found[failed[0]]
        raise PeerFailed(f"rank {failed[0]} failed: {message}", exit_status)

    @contextmanager
    def node_leader_first(self) -> Iterator[None]:
        """Runs the block on the first rank of each node, and on its other ranks once that one is through.

        What the leader prepares (a data cache) the others then find ready. They go on when it fails, too, and
        meet the same error; `agree` around the whole says it once.
        """
        key = f"dpgen/node_ready/{self._take_sequence_number()}/{self.nodes[self.rank]}"
        if not self.is_node_leader:
            while self.checked_store.add(key, 0) == 0:
                self.raise_if_peer_failed()
                time.sleep(_POLL_S)
        try:
            yield
        finally:
            if self.is_node_leader:
                self.checked_store.add(key, 1)

    _phase = 0

    def _take_sequence_number(self) -> int:
        """Numbers the uses of `node_leader_first`, which all ranks pass in the same order."""
        self._phase += 1
        return self._phase


class _CompletedReduce:
    """A collective of one."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = list(values)

    def done(self) -> bool:
        return True

    def result(self) -> list[int]:
        return self._values


class InMemoryStore:
    """Named counters within one process."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self._counts[key] = self._counts.get(key, 0) + amount
        return self._counts[key]

    def get_many(self, keys: Sequence[str]) -> list[int]:
        return [self._counts[key] for key in keys]


class SingleRankGroup(RankGroup):
    """A world of one; imports no torch."""

    rank, size = 0, 1

    def __init__(self, topology: Topology | None = None) -> None:
        self.store = InMemoryStore()
        self.nodes = [topology.node if topology else ""]

    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        return _CompletedReduce(values)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def gather_object(self, value: Any) -> list[Any] | None:
        return [value]

    def all_reduce_any(self, mask: np.ndarray) -> np.ndarray:
        return mask

    def all_reduce_sum(self, counts: np.ndarray) -> np.ndarray:
        return counts

    def raise_if_peer_failed(self) -> None:
        return

    def announce_failure(self, message: str, exit_status: int) -> bool:
        return True

    def first_failure_status(self) -> int | None:
        return None

    def shrink(self) -> None:
        raise AssertionError("there is no other rank to lose")

    def heartbeat(self) -> None:
        return

    def pause_heartbeat(self) -> None:
        return

    def close(self) -> None:
        return


class PeerLost(PeerFailed):
    """A peer vanished without a word (killed, or its node cut off); nobody else will tell the user."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_RESUMABLE)


class StoreLost(PeerFailed):
    """The store's host is gone: what is finished stays in the journals, and the same command goes on from it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_RESUMABLE)
