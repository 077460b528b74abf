"""Two or more ranks: torch.distributed's gloo backend and its TCPStore. Home of `torch.distributed`.

Every rank renews a lease in the store. A rank that is killed closes its connections, one that hangs or is cut off
stops renewing: either way the others can go on without it (`GlooGroup.shrink`), as long as rank 0, which keeps the
store, is among them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dpgen.distributed.group import PeerLost, PendingReduce, RankGroup, StoreLost
from dpgen.distributed.leases import Leases
from dpgen.distributed.network import find_interface_to, raise_open_file_limit, wait_for_torchrun_store
from dpgen.distributed.rendezvous import join_rendezvous
from dpgen.distributed.store_discovery import StoreAdvertiser, discover_store
from dpgen.distributed.timeout_store import TimeoutStore
from dpgen.distributed.topology import Topology
from dpgen.errors import EXIT_RESUMABLE, DpgenError, PeerFailed
from dpgen.log import setup_logging

if TYPE_CHECKING:
    import numpy as np

_NO_TIMEOUT = timedelta(days=20)  # gloo counts milliseconds in 32 bits, signed: 24.8 days is its longest
_JOIN_TIMEOUT = timedelta(minutes=30)  # until every rank has been started: a batch system may start them one by one
_REJOIN_TIMEOUT = timedelta(seconds=30)  # all who are to come have just shown up
_AGENT_TIMEOUT = timedelta(seconds=30)
_FAILURE = "dpgen/failure"
_DEPARTED = "dpgen/left"  # in the store: how many ranks need it no more
_PEER_CHECK_INTERVAL_S = 0.5
# Not renewed for so long, or a store that has not answered for so long: lost. DPGEN_LEASE_S is for tests, which would
# otherwise wait a minute each: on a busy machine or network a short one takes slow ranks for lost.
_LEASE_S = float(os.environ.get("DPGEN_LEASE_S") or 60.0)
_BROKEN_LEASE_S = _LEASE_S / 4  # the same, once the group is known to be broken
_POLL_S = 0.05
_SHORT_POLL_S = 0.001
# Worlds with collectives that never end. Destroying one would wait for them, so they stay until the process ends.
_LEAKED_GROUPS: list[Any] = []


class GlooGroup(RankGroup):
    """See `Group`."""

    store: TimeoutStore

    def __init__(self, topology: Topology) -> None:
        """Joins; returns when all ranks have.

        Raises:
            DpgenError: not all ranks came within half an hour, or the store can't be reached.
        """
        raise_open_file_limit(64 + 4 * topology.dp_size)
        self.rank, self.size = topology.dp_rank, topology.dp_size
        self._initial_rank = topology.dp_rank  # its name for life; `rank` changes when the group shrinks
        self._members = list(range(topology.dp_size))
        self._epoch = 0
        self._next_look_s = 0.0
        self._is_closed = False
        self._gather_thread = ThreadPoolExecutor(1, thread_name_prefix="gather")
        agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts_store = topology.is_rank_0 and not agent_keeps_store
        # torchrun ends and restarts all ranks when it sees one die; srun can leave the others alone.
        self.can_shrink = topology.launcher == "slurm"
        port = topology.master_port  # 0 for rank 0 to let the kernel choose
        if topology.discovery_ports and not topology.is_rank_0:
            limit_s = _JOIN_TIMEOUT.total_seconds()
            port = discover_store(topology.master_addr, topology.discovery_ports, topology.job, limit_s)
        address = (topology.master_addr, port)
        if agent_keeps_store:
            wait_for_torchrun_store(address)
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := find_interface_to(address)):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        try:
            self._base = dist.TCPStore(  # type: ignore[attr-defined]
                *address,
                None if agent_keeps_store else topology.dp_size,
                is_master=self._hosts_store,
                # A launcher's store is up before its ranks are; rank 0's comes whenever rank 0 is started.
                timeout=_AGENT_TIMEOUT if agent_keeps_store else _JOIN_TIMEOUT,
                wait_for_workers=False,
                multi_tenant=True,
            )
            port = self._base.port
            self._base.set_timeout(_JOIN_TIMEOUT)
            with ExitStack() as until_met:
                if topology.discovery_ports and topology.is_rank_0:
                    until_met.enter_context(StoreAdvertiser(topology.discovery_ports, topology.job, port))
                # A restarted job may meet the store of its former self: each gathering has names of its own.
                say = setup_logging(self.rank)
                self._key_prefix = (
                    f"dpgen/{join_rendezvous(self._base, self.rank, self.size, _JOIN_TIMEOUT.total_seconds(), say)}"
                )
            self.store = TimeoutStore(self._make_prefixed_store(), _LEASE_S)
            self._connect()
        except (RuntimeError, ValueError) as error:
            raise DpgenError(
                f"rank {self.rank} could not join the group of {self.size} ranks at "
                f"{topology.master_addr}:{port}: {_summarize_error(error)}"
            ) from None
        self._leases = Leases(self.store, self._make_prefixed_store().clone(), self._initial_rank)
        self.nodes = self.all_gather_object(topology.node)

    @property
    def checked_store(self) -> _CheckedStore:
        return _CheckedStore(self)

    def _connect(self) -> None:
        epoch = c10d.PrefixStore(f"epoch-{self._epoch}", self._make_prefixed_store())
        limit = _JOIN_TIMEOUT if self._epoch == 0 else _REJOIN_TIMEOUT
        self._base.set_timeout(limit)  # ranks meet through the store, by its limit
        dist.init_process_group("gloo", store=epoch, rank=self.rank, world_size=self.size, timeout=limit)
        # The limit was for meeting; from now on slow ranks are waited for.
        c10d._set_pg_timeout(_NO_TIMEOUT)
        self._base.set_timeout(_NO_TIMEOUT)

    def _make_prefixed_store(self) -> Any:
        return c10d.PrefixStore(self._key_prefix, self._base)

    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        tensor = torch.tensor(list(values), dtype=torch.int64)
        kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MIN
        with self.translate_errors():
            return _GlooReduce(self, dist.all_reduce(tensor, op=kind, async_op=True), tensor)

    def all_gather_object(self, value: Any) -> list[Any]:
        # Not dist.all_gather_object, which blocks: a rank that waits in it can't notice that the group is broken.
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait_for_work(lambda: dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        longest = max(int(size) for size in sizes)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        mine = torch.nn.functional.pad(data, (0, longest - len(data)))
        self._wait_for_work(lambda: dist.all_gather(padded, mine, async_op=True))
        pairs = zip(padded, sizes, strict=True)
        return [pickle.loads(each[: int(size)].numpy().tobytes()) for each, size in pairs]

    def gather_object(self, value: Any) -> list[Any] | None:
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        # Aside, since it blocks, whoever has been lost.
        gathered = self._gather_thread.submit(dist.gather_object, value, found, dst=0)
        with self.translate_errors():
            while True:
                try:
                    gathered.result(_POLL_S)
                    return found
                except TimeoutError:
                    self.raise_if_peer_failed()

    def all_reduce_any(self, mask: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(mask.astype("uint8"))
        self._wait_for_work(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True))
        return tensor.numpy().astype(bool)

    @property
    def num_shrinks(self) -> int:
        return self._epoch

    def all_reduce_sum(self, counts: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(counts.copy())
        self._wait_for_work(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=True))
        return tensor.numpy()

    def _wait_for_work(self, start: Callable[[], Any]) -> None:
        """Starts a collective and waits for it, with an eye on the other ranks."""
        with self.translate_errors():
            work = start()
            while not work.is_completed():
                self.raise_if_peer_failed()
                time.sleep(_SHORT_POLL_S)
            work.wait()

    def raise_if_peer_failed(self) -> None:
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + _PEER_CHECK_INTERVAL_S
        with self.translate_errors():
            self._raise_if_announced()
            if self.store.check([self._shrink_key(self._epoch + 1)]):
                raise PeerLost("another rank was lost")
            if self.rank > 0:
                return  # rank 0 watches for all: it leads any shrinking, and the store has N leases to give, not N x N
            stale = self._leases.find_expired(self._members, _LEASE_S)
        if stale:
            raise PeerLost(f"rank {stale[0]} has not been heard of for {_LEASE_S:.0f} s")

    def _raise_if_announced(self) -> None:
        if self.store.check([_FAILURE]):
            raise self._make_peer_error()

    def announce_failure(self, message: str, exit_status: int) -> bool:
        try:
            is_first: bool = self.store.add(f"{_FAILURE}/count", 1) == 1
            if is_first:
                note = {"rank": self._initial_rank, "message": message, "exit_status": exit_status}
                self.store.set(_FAILURE, json.dumps(note))
        except RuntimeError:
            return True  # the store is gone, so nobody else can have said it
        return is_first

    def first_failure_status(self) -> int | None:
        try:
            if self.store.check([_FAILURE]):
                return int(json.loads(self.store.get(_FAILURE))["exit_status"])
        except RuntimeError:
            return None  # the store is gone, and with it what was announced
        return None

    def heartbeat(self) -> None:
        self._leases.heartbeat()

    def pause_heartbeat(self) -> None:
        self._leases.pause_heartbeat()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._leases.stop()
        if self._hosts_store:
            self._keep_store_until_peers_leave()
        else:
            with contextlib.suppress(RuntimeError):  # the store is gone: nobody waits for this rank to leave
                self.store.add(_DEPARTED, 1)
        # The process group is left to the end of the process: destroying it waits for collectives under way.

    # ---- going on without a rank

    def shrink(self) -> None:
        with self.translate_errors():
            self._epoch += 1
            self.store.set(self._shrink_key(self._epoch), "1")
            self.store.set(f"{self._shrink_key(self._epoch)}/{self._initial_rank}", "1")
            members = self._publish_members() if self.rank == 0 else self._wait_for_members()
        if self._initial_rank not in members:
            raise PeerFailed("this rank was given up by the others, who had not heard of it", EXIT_RESUMABLE)
        self.nodes = [self.nodes[self._members.index(member)] for member in members]
        self._members = members
        self.rank, self.size = members.index(self._initial_rank), len(members)
        self._reset_torch_world()
        try:
            self._connect()
        except RuntimeError as error:
            raise PeerLost(f"another rank was lost while the group was made anew ({_summarize_error(error)})") from None

    def _shrink_key(self, epoch: int) -> str:
        return f"dpgen/shrink/{epoch}"

    def _publish_members(self) -> list[int]:
        """On rank 0: waits for every rank that still renews its lease, and publishes who has come."""
        key = self._shrink_key(self._epoch)
        while True:
            here = [member for member in self._members if self.store.check([f"{key}/{member}"])]
            gone = self._leases.find_expired(self._members, _BROKEN_LEASE_S)
            if set(here) | set(gone) >= set(self._members):
                break
            self._raise_if_announced()
            time.sleep(_POLL_S)
        self.store.set(f"{key}/members", json.dumps(here))
        return here

    def _wait_for_members(self) -> list[int]:
        key = f"{self._shrink_key(self._epoch)}/members"
        while not self.store.check([key]):
            self._raise_if_announced()
            time.sleep(_POLL_S)
        members: list[int] = json.loads(self.store.get(key))
        return members

    def _reset_torch_world(self) -> None:
        """Forgets torch.distributed's world without destroying it: that waits for collectives that never end.

        `init_process_group` may then be called again. There is no public way to do this (torch 2.13).
        """
        world = c10d._world
        _LEAKED_GROUPS.append(world.default_pg)
        for table in (
            world.pg_map,
            world.pg_names,
            world.pg_group_ranks,
            world.pg_backend_config,
            world.pg_to_tag,
            world.tags_to_pg,
            world.pg_coalesce_state,
        ):
            table.clear()
        c10d._update_default_pg(None)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turns gloo's and the store's low-level errors into the failure that a peer announced before it died."""
        try:
            yield
        except DpgenError:
            raise
        except RuntimeError as error:  # torch.distributed's errors are all RuntimeErrors
            raise self._make_peer_error(lost=_summarize_error(error)) from None

    def _make_peer_error(self, lost: str | None = None) -> PeerFailed:
        """What the failing peer announced, or that one vanished without a word."""
        deadline_s = time.monotonic() + (2.0 if lost else 0.0)
        try:
            while not self.store.check([_FAILURE]):
                if time.monotonic() >= deadline_s:
                    break
                time.sleep(_POLL_S)  # the announcement and the closed connection may arrive in either order
            else:
                note = json.loads(self.store.get(_FAILURE))
                return PeerFailed(f"rank {note['rank']} failed: {note['message']}", int(note["exit_status"]))
        except RuntimeError as error:
            return StoreLost(
                f"rank {self._initial_rank} lost rank 0, which keeps the store ({_summarize_error(error)})"
            )
        return PeerLost(f"rank {self._initial_rank} lost contact with another rank, killed or cut off ({lost})")

    def _keep_store_until_peers_leave(self, limit_s: float = 10.0) -> None:
        """Keeps the store up until the others have left, or a while at most: they may still be reading from it."""
        deadline_s = time.monotonic() + limit_s
        with contextlib.suppress(RuntimeError):
            while self.store.add(_DEPARTED, 0) < self.size - 1 and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)


class _CheckedStore:
    """See `Group.counters`."""

    def __init__(self, group: GlooGroup) -> None:
        self._group = group

    def add(self, key: str, amount: int) -> int:
        with self._group.translate_errors():
            return self._group.store.add(key, amount)

    def get_many(self, keys: Sequence[str]) -> list[int]:
        with self._group.translate_errors():
            return self._group.store.get_many(keys)


class _GlooReduce:
    def __init__(self, group: GlooGroup, work: Any, tensor: torch.Tensor) -> None:
        self._group, self._work, self._tensor = group, work, tensor

    def done(self) -> bool:
        with self._group.translate_errors():
            if not self._work.is_completed():
                self._group.raise_if_peer_failed()
                return False
            self._work.wait()  # raises what the collective ran into
            return True

    def result(self) -> list[int]:
        return [int(each) for each in self._tensor.tolist()]


def _summarize_error(error: Exception) -> str:
    """A library's error without its place in the source, its advice and its jokes."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.rpartition("] ")[2].partition(". This is typically")[0]
