"""The ranks' conversation: a gloo group and its c10d store behind one small interface, or a world of one.

Callers never ask which it is. Three rules keep a large job from hanging:

* a collective that may have to wait for a slow rank is asynchronous (`Group.reduce` gives a `Pending`), and whoever
  waits keeps asking whether a peer has failed;
* the collectives have no 30-minute limit: slow ranks are waited for, dead ones are noticed by their closed
  connections and by the failure that a dying rank leaves in the store;
* the first rank to fail says why, the others only end.
"""

from __future__ import annotations

import json
import os
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

from dpgen.errors import DpgenError, PeerFailed
from dpgen.topology import Topology

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

_FOREVER = timedelta(days=20)  # gloo counts milliseconds in 32 bits, signed: 24.8 days is its longest
_JOIN_TIMEOUT = timedelta(minutes=30)  # until every rank has been started: a batch system may start them one by one
_FAILURE = "dpgen/failure"
_POLL_S = 0.02


class Pending(Protocol):
    """A collective under way."""

    def done(self) -> bool:
        """Whether the result is there.

        Raises:
            PeerFailed: it never will be.
        """

    def result(self) -> list[int]:
        """The reduced numbers; only once `done`."""


class Store(Protocol):
    """The part of c10d's Store that claims need: named counters."""

    def add(self, key: str, amount: int) -> int:
        """Adds atomically, from 0, and gives the sum."""


class Group(ABC):
    """All ranks of the job, seen from one of them."""

    rank: int
    size: int
    store: Store

    @abstractmethod
    def reduce(self, values: Sequence[int], op: Literal["sum", "min"]) -> Pending:
        """Starts an element-wise all-reduce of whole numbers (int64) over all ranks."""

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""

    @abstractmethod
    def gather_object(self, value: Any) -> list[Any] | None:
        """Every rank's value, by rank, on rank 0; None elsewhere."""

    @abstractmethod
    def union(self, mask: np.ndarray) -> np.ndarray:
        """Element-wise "any rank has it" over boolean arrays of one shape."""

    @abstractmethod
    def raise_if_peer_failed(self) -> None:
        """Raises PeerFailed if another rank has announced that it failed."""

    @abstractmethod
    def announce_failure(self, message: str, exit_status: int) -> bool:
        """Tells the other ranks that this one failed; True if it was the first to, and so is the one to say why."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the group; safe to call twice."""

    def wait(self, pending: Pending, while_waiting: Callable[[], None] | None = None) -> list[int]:
        """Waits for a collective, however long the slowest rank takes.

        Raises:
            PeerFailed: a rank failed meanwhile.
        """
        while not pending.done():
            if while_waiting is not None:
                while_waiting()
            time.sleep(_POLL_S)
        return pending.result()

    def agree(self, action: Callable[[], T]) -> T:
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
    def node_leader_first(self, topology: Topology) -> Iterator[None]:
        """Runs the block on the first rank of each node, and on its other ranks once that one is through.

        What the leader prepares (a data cache) the others then find ready. They go on when it fails, too, and
        meet the same error; `agree` around the whole says it once.
        """
        key = f"dpgen/node_ready/{self._next_phase()}/{topology.node}"
        if not topology.leads_node:
            while self.store.add(key, 0) == 0:
                self.raise_if_peer_failed()
                time.sleep(_POLL_S)
        try:
            yield
        finally:
            if topology.leads_node:
                self.store.add(key, 1)

    _phase = 0

    def _next_phase(self) -> int:
        """Numbers the uses of `node_leader_first`, which all ranks pass in the same order."""
        self._phase += 1
        return self._phase


class _Ready:
    """A collective of one."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = list(values)

    def done(self) -> bool:
        return True

    def result(self) -> list[int]:
        return self._values


class LocalStore:
    """Named counters within one process."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self._counts[key] = self._counts.get(key, 0) + amount
        return self._counts[key]


class LoneGroup(Group):
    """A world of one; imports no torch."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.store = LocalStore()

    def reduce(self, values: Sequence[int], op: Literal["sum", "min"]) -> Pending:
        return _Ready(values)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def gather_object(self, value: Any) -> list[Any] | None:
        return [value]

    def union(self, mask: np.ndarray) -> np.ndarray:
        return mask

    def raise_if_peer_failed(self) -> None:
        return

    def announce_failure(self, message: str, exit_status: int) -> bool:
        return True

    def close(self) -> None:
        return


class _GlooPending:
    def __init__(self, group: GlooGroup, work: Any, tensor: Any) -> None:
        self._group, self._work, self._tensor = group, work, tensor

    def done(self) -> bool:
        with self._group.telling_peer_failure():
            if not self._work.is_completed():
                self._group.raise_if_peer_failed()
                return False
            self._work.wait()  # raises what the collective ran into
            return True

    def result(self) -> list[int]:
        return [int(each) for each in self._tensor.tolist()]


class GlooGroup(Group):
    """Two or more ranks: torch.distributed's gloo backend and its TCPStore."""

    def __init__(self, topology: Topology) -> None:
        """Joins; returns when all ranks have.

        Raises:
            DpgenError: not all ranks came within half an hour, or the store can't be reached.
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        _raise_file_limit(64 + 4 * topology.dp_size)
        self.rank, self.size = topology.dp_rank, topology.dp_size
        self._dist = dist
        self._next_look_s = 0.0
        try:
            base = _open_store(topology)
            # A restarted job may meet the store of its former self: each restart has names of its own.
            store = PrefixStore(f"dpgen/{topology.restart}", base)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=_FOREVER)
        except (RuntimeError, ValueError) as error:
            raise DpgenError(
                f"rank {self.rank} could not join the group of {self.size} ranks at "
                f"{topology.master_addr}:{topology.master_port}: {str(error).splitlines()[0]}"
            ) from None
        base.set_timeout(_FOREVER)
        self.store = store
        self._hosts_store = topology.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def reduce(self, values: Sequence[int], op: Literal["sum", "min"]) -> Pending:
        import torch

        tensor = torch.tensor(list(values), dtype=torch.int64)
        kind = self._dist.ReduceOp.SUM if op == "sum" else self._dist.ReduceOp.MIN
        with self.telling_peer_failure():
            return _GlooPending(self, self._dist.all_reduce(tensor, op=kind, async_op=True), tensor)

    def all_gather_object(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with self.telling_peer_failure():
            self._dist.all_gather_object(found, value)
        return found

    def gather_object(self, value: Any) -> list[Any] | None:
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self.telling_peer_failure():
            self._dist.gather_object(value, found, dst=0)
        return found

    def union(self, mask: np.ndarray) -> np.ndarray:
        import torch

        tensor = torch.from_numpy(mask.astype("uint8"))
        with self.telling_peer_failure():
            self._dist.all_reduce(tensor, op=self._dist.ReduceOp.MAX)
        return tensor.numpy().astype(bool)

    def raise_if_peer_failed(self) -> None:
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + 0.5
        with self.telling_peer_failure():
            failed = self.store.check([_FAILURE])  # type: ignore[attr-defined]
        if failed:
            raise self._peer_failure()

    def announce_failure(self, message: str, exit_status: int) -> bool:
        try:
            is_first = self.store.add(f"{_FAILURE}/count", 1) == 1
            if is_first:
                note = {"rank": self.rank, "message": message, "exit_status": exit_status}
                self.store.set(_FAILURE, json.dumps(note))  # type: ignore[attr-defined]
        except RuntimeError:
            return True  # the store is gone, so nobody else can have said it
        return is_first

    def close(self) -> None:
        if self._hosts_store:
            self._outlast_peers()
        if self._dist.is_initialized():
            self._dist.destroy_process_group()

    @contextmanager
    def telling_peer_failure(self) -> Iterator[None]:
        """Turns gloo's and the store's low-level errors into the failure that a peer announced before it died."""
        try:
            yield
        except DpgenError:
            raise
        except RuntimeError as error:  # torch.distributed's errors are all RuntimeErrors
            raise self._peer_failure(lost=str(error).splitlines()[0]) from None

    def _peer_failure(self, lost: str | None = None) -> PeerFailed:
        """What the failing peer announced, or that one vanished without a word."""
        deadline_s = time.monotonic() + (5.0 if lost else 0.0)
        try:
            while not self.store.check([_FAILURE]):  # type: ignore[attr-defined]
                if time.monotonic() >= deadline_s:
                    break
                time.sleep(0.1)  # the announcement and the closed connection may arrive in either order
            else:
                note = json.loads(self.store.get(_FAILURE))  # type: ignore[attr-defined]
                self.store.add(f"{_FAILURE}/heard", 1)
                return PeerFailed(f"rank {note['rank']} failed: {note['message']}", int(note["exit_status"]))
        except RuntimeError as error:
            lost = lost or str(error).splitlines()[0]
        return PeerLost(f"rank {self.rank} lost contact with another rank, which was killed or cut off ({lost})")

    def _outlast_peers(self, limit_s: float = 10.0) -> None:
        """Keeps the store up until the others have read a failure from it, or a while at most."""
        deadline_s = time.monotonic() + limit_s
        try:
            while self.store.check([_FAILURE]) and time.monotonic() < deadline_s:  # type: ignore[attr-defined]
                if self.store.add(f"{_FAILURE}/heard", 0) >= self.size - 1:
                    return
                time.sleep(0.1)
        except RuntimeError:
            return


class PeerLost(PeerFailed):
    """A peer vanished without a word (killed, or its node cut off); nobody else will tell the user."""


def _open_store(topology: Topology) -> Any:
    """The TCP store at the master's address: the launcher's own where it keeps one, else rank 0 opens it."""
    import torch.distributed as dist

    agent_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(  # type: ignore[attr-defined]
        topology.master_addr,
        topology.master_port,
        topology.dp_size if not agent_keeps_it else None,
        is_master=topology.is_first and not agent_keeps_it,
        timeout=_JOIN_TIMEOUT,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _raise_file_limit(extra: int) -> None:
    """Raises the soft limit of open files towards the hard one: gloo holds about 20 + 2 x ranks a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + extra if hard == resource.RLIM_INFINITY else min(hard, soft + extra)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def join(topology: Topology) -> Group:
    """The group of all ranks; waits until they are there."""
    return GlooGroup(topology) if topology.dp_size > 1 else LoneGroup()
