"""Connect the ranks: a gloo group and its c10d store behind one small interface, or a world of one.

- Callers never ask which of the two a group is.
- A collective that may wait for a slow rank is asynchronous (`RankGroup.all_reduce_async`), and the waiting rank keeps
  checking whether a peer has failed.
- Collectives have no 30-minute limit. Slow ranks are waited for. Dead ranks are noticed by their closed connections,
  by their expired leases, and by the failure that a dying rank leaves in the store.
- The first rank to fail reports why; the others only exit.

Waiting loops are kept by hand: tenacity (9.2) repeats a call that raises, while each turn here also checks the peers.
"""

from __future__ import annotations

import logging
import resource
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

from dpgen.distributed.codec import decode, encode
from dpgen.distributed.topology import Topology
from dpgen.errors import EXIT_RESUMABLE, DpgenError, PeerFailed
from dpgen.log import PeriodicLog

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

T = TypeVar("T")
Milestone = Literal["gathered", "complete"]  # rank 0 has all rows; it has written the result

_POLL_S = 0.02
_MAX_POLL_S = 1.0  # up to a thousand ranks ...
_MAX_POLL_PER_RANK_S = 0.001  # ... and with more of them, their one store gets about a thousand questions a second


class PeerLost(PeerFailed):
    """Report a peer that vanished (killed, hung, or its node cut off) and so could not report why."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_RESUMABLE)


class StoreLost(PeerFailed):
    """Report the loss of the store's host. Finished rows stay in the journals; the same command resumes the run."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_RESUMABLE)


class AllRowsGathered(Exception):
    """Tell a rank that waits for others that rank 0 has all rows, and finishes the job without it."""


class HostLimitReached(DpgenError):
    """Report that this rank can't connect to others for want of files, ports or memory of its own host."""

    exit_status = EXIT_RESUMABLE

    def __init__(self, rank: int, cause: str) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        super().__init__(
            f"rank {rank} on {socket.gethostname()} can't connect to the other ranks: {cause} (open files: limit "
            f"{soft:,}, hard limit {hard:,}). Raise the hard limit (ulimit -Hn), and rerun the same command to resume"
        )


class StorePoll:
    """Sleep between two questions to the store: the longer a rank waits, and the more ranks wait, the longer.

    Args:
        num_ranks: how many ranks may wait for the same.
    """

    def __init__(self, num_ranks: int) -> None:
        self._sleep_s, self._max_s = _POLL_S, max(_MAX_POLL_S, num_ranks * _MAX_POLL_PER_RANK_S)

    def sleep(self) -> None:
        time.sleep(self._sleep_s)
        self._sleep_s = min(1.5 * self._sleep_s, self._max_s)


class PendingReduce(Protocol):
    """Hold a collective in progress."""

    def done(self) -> bool:
        """Return True once the result has arrived.

        Raises:
            PeerFailed: a rank failed, so the result will never arrive.
        """

    def result(self) -> list[int]:
        """Return the reduced numbers; call it only once `done` returns True."""


class CounterStore(Protocol):
    """Named counters: the part of c10d's Store that claims need."""

    def add(self, key: str, amount: int) -> int:
        """Add atomically, from 0, and return the sum."""

    def get_many(self, keys: Sequence[str]) -> list[int]:
        """Return the counters of these keys in one request; all of them must exist."""


class RankGroup(ABC):
    """All ranks of the job, seen from one of them."""

    rank: int
    size: int
    nodes: list[str]  # the node of each rank
    store: CounterStore
    get_wait_s: Callable[[], float] = staticmethod(lambda: 0.0)  # how long this rank has waited for others by now
    can_shrink = False  # True if the launcher lets ranks continue without a lost one

    @property
    def checked_store(self) -> CounterStore:
        """The store, with its errors turned into PeerFailed, as the group's are."""
        return self.store

    @property
    def is_node_leader(self) -> bool:
        """True on the lowest rank of each node."""
        return self.nodes.index(self.nodes[self.rank]) == self.rank

    @property
    def num_shrinks(self) -> int:
        """How often the group has shrunk; the same on all ranks."""
        return 0

    @abstractmethod
    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        """Start an element-wise all-reduce of int64 values. Collective."""

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank; see `dpgen.distributed.codec` for values. Collective.

        Raises:
            ForeignMessage: another program, or another version of dpgen, sent something.
        """

    @abstractmethod
    def gather_object(self, value: Any, senders: Sequence[int] | None = None) -> list[Any] | None:
        """Return every rank's value, as `all_gather_object` does, on rank 0; None on the others. Collective.

        Args:
            senders: the ranks that have a value, the same on all ranks; None for all. The others' are None.
        """

    @abstractmethod
    def all_reduce_any(self, mask: np.ndarray) -> np.ndarray:
        """Return the element-wise "any" of boolean arrays of one shape. Collective."""

    @abstractmethod
    def all_reduce_sum(self, counts: np.ndarray) -> np.ndarray:
        """Return the element-wise sums of int64 arrays of one shape. Collective."""

    @abstractmethod
    def raise_if_peer_failed(self) -> None:
        """Raise PeerFailed if another rank has announced a failure or was lost."""

    @abstractmethod
    def announce_failure(self, message: str, exit_status: int) -> bool:
        """Announce to the other ranks that this one failed; return True if it is the first, which reports why."""

    @abstractmethod
    def first_failure_status(self) -> int | None:
        """Return the exit status of the failure announced first; None if there is none, or the store is gone."""

    @abstractmethod
    def shrink(self) -> None:
        """Remove lost ranks from the group. Collective over the remaining ranks; `rank` and `size` may change.

        Raises:
            PeerLost: another rank was lost meanwhile.
            PeerFailed: the group can't shrink, or the other ranks removed this one.
            AllRowsGathered: rank 0 waits for no other rank any more.
        """

    @abstractmethod
    def enter_phase(self, name: str, *, is_slow: bool = False) -> None:
        """Tell the other ranks what this one does from now on; without heartbeats it counts as stuck.

        Args:
            name: "loading the model".
            is_slow: a single step of it may take hours (2 h at most), not only minutes (5 min).
        """

    @abstractmethod
    def heartbeat(self) -> None:
        """Report that the main thread makes progress. Waiting for other ranks reports it, too."""

    @abstractmethod
    def reach_milestone(self, milestone: Milestone) -> None:
        """Announce on rank 0 that the job has come so far, and wait for that word on the others.

        Raises:
            PeerFailed: rank 0 failed, or was lost.
            PeerLost: another rank was lost before the rows were gathered, and needs a peer to go on.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the group; safe to call twice."""

    def wait(self, pending: PendingReduce, on_wait: Callable[[], None] = lambda: None) -> list[int]:
        """Return the result of a collective, however long the slowest rank takes.

        Args:
            on_wait: called at every poll.

        Raises:
            PeerFailed: a rank failed meanwhile.
        """
        while not pending.done():
            on_wait()
            time.sleep(_POLL_S)
        return pending.result()

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank, and raise on every rank if any raised, so one error is reported once. Collective.

        Raises:
            DpgenError: this rank's own error, on the lowest rank that has one.
            PeerFailed: the error of the lowest rank that has one, on all others.
        """
        error: DpgenError | None = None
        value: T | None = None
        try:
            value = action()
        except PeerFailed:
            raise  # the others notice it, too, and can't take part in what follows
        except DpgenError as raised:
            error = raised
        outcomes = self.all_gather_object(None if error is None else (str(error), error.exit_status))
        failed_ranks = [rank for rank, outcome in enumerate(outcomes) if outcome is not None]
        if not failed_ranks:
            return cast(T, value)
        first = failed_ranks[0]
        if first == self.rank:
            assert error is not None
            raise error
        message, exit_status = outcomes[first]
        raise PeerFailed(f"rank {first} failed: {message}", exit_status)

    @contextmanager
    def node_leader_first(self) -> Iterator[None]:
        """Run the block on the first rank of each node, then on the node's other ranks. Collective.

        The other ranks find what the leader has prepared (a data cache). They also start if the leader failed, and
        meet the same error; `run_on_all_ranks` around the block reports it once.
        """
        key = f"dpgen/node_ready/{self._take_sequence_number()}/{self.nodes[self.rank]}"
        if not self.is_node_leader:
            poll, log = StorePoll(self.size), self.make_node_leader_log("to go first")
            while self.checked_store.add(key, 0) == 0:
                self.raise_if_peer_failed()
                log()
                poll.sleep()
        try:
            yield
        finally:
            if self.is_node_leader:
                self.checked_store.add(key, 1)

    def make_node_leader_log(self, action: str) -> Callable[[], None]:
        """Return what to call while waiting for the first rank of this node: its second rank says so for the others.

        Args:
            action: what that rank is waited for, e.g. "to load the model".
        """
        node = self.nodes[self.rank]
        leader, *others = [rank for rank, name in enumerate(self.nodes) if name == node]
        if others[0] != self.rank:
            return lambda: None
        return PeriodicLog(
            logger, lambda: f"waiting for rank {leader}, the first of {node}, {action}", on_all_ranks=True
        )

    _sequence_number = (0, 0)

    def _take_sequence_number(self) -> str:
        """Number the uses of `node_leader_first`, which all ranks pass in the same order; after a loss anew."""
        num_shrinks, number = self._sequence_number
        self._sequence_number = (self.num_shrinks, number + 1 if num_shrinks == self.num_shrinks else 1)
        return "{}.{}".format(*self._sequence_number)


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
    """Form a world of one, without torch."""

    rank, size = 0, 1

    def __init__(self, topology: Topology | None = None) -> None:
        self.store = InMemoryStore()
        self.nodes = [topology.node if topology else ""]

    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        return _CompletedReduce(values)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [decode(encode(value))]  # as among several ranks: tuples become lists, and other types are rejected

    def gather_object(self, value: Any, senders: Sequence[int] | None = None) -> list[Any] | None:
        return self.all_gather_object(value)

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

    def enter_phase(self, name: str, *, is_slow: bool = False) -> None:
        return

    def heartbeat(self) -> None:
        return

    def reach_milestone(self, milestone: Milestone) -> None:
        return

    def close(self) -> None:
        return


class _CompletedReduce:
    """Hold the result of a collective over one rank."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = list(values)

    def done(self) -> bool:
        return True

    def result(self) -> list[int]:
        return self._values
