"""Connect two or more ranks by torch.distributed's gloo backend and its TCPStore. Home of `torch.distributed`.

- Every rank renews a lease in the store. A killed rank closes its connections; a rank that hangs or is cut off stops
  renewing. Either way the other ranks can continue without it (`GlooGroup.shrink`).
- Rank 0 watches the leases, keeps the store (unless torchrun does) and leads every shrink. The others watch rank 0's.
- Limit: a group that lost rank 0 can't shrink; its ranks exit resumable.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from dpgen.distributed.codec import decode, encode
from dpgen.distributed.gloo.checked_store import CheckedStore
from dpgen.distributed.gloo.failures import FailureBoard
from dpgen.distributed.gloo.leases import Leases, end_stuck_process, read_lease_timing
from dpgen.distributed.gloo.membership import Membership
from dpgen.distributed.gloo.timeout_store import TimeoutStore
from dpgen.distributed.gloo.torch_world import (
    add_prefix,
    clone_store,
    connect_world,
    forget_world,
    gather_values,
    open_store,
    summarize_error,
)
from dpgen.distributed.gloo.wait_log import WaitLog
from dpgen.distributed.group import (
    AllRowsGathered,
    HostLimitReached,
    Milestone,
    PeerLost,
    PendingReduce,
    RankGroup,
    StoreLost,
    StorePoll,
)
from dpgen.distributed.network import (
    LOOPBACK,
    Address,
    find_interface_to,
    is_local_error,
    raise_open_file_limit,
    wait_for_torchrun_store,
)
from dpgen.distributed.rendezvous import Departure, join_rendezvous, read_join_timeout
from dpgen.distributed.stages import Stage, run_stages
from dpgen.distributed.store_discovery import StoreAdvertiser, discover_store
from dpgen.distributed.topology import Topology, name_nodes, read_boot_id
from dpgen.errors import EXIT_RESUMABLE, DpgenError, JoinFailed, PeerFailed

if TYPE_CHECKING:
    import numpy as np

_CONNECT_TIMEOUT_S = 30.0  # every rank has just arrived, or entered the shrink ...
_CONNECT_TIMEOUT_PER_RANK_S = 0.05  # ... and connects to every other
_AGENT_TIMEOUT_S = 30.0
_PEER_CHECK_INTERVAL_S = 0.5  # up to a thousand ranks ...
_PEER_CHECK_INTERVAL_PER_RANK_S = 0.0005  # ... and with more of them, their one store is asked no more often
_POLL_S = 0.05
_SHORT_POLL_S = 0.001
_MILESTONE = "dpgen/milestone"  # store key: below it, how far rank 0 has come
_DEPARTED = "dpgen/left"  # store key: the number of ranks that no longer need the store


class GlooGroup(RankGroup):
    """All ranks of a job of two or more, connected by gloo."""

    store: TimeoutStore

    def __init__(
        self, topology: Topology, before_exit: Callable[[], None] = lambda: None, departure: Departure | None = None
    ) -> None:
        """Join the group, and return once all ranks have joined. Collective.

        Args:
            before_exit: called, in another thread, before this process ends because its main thread is stuck.
            departure: tells the other ranks if this one leaves before all have joined.

        Raises:
            JoinFailed: not all ranks joined in time, or the store can't be reached.
            PeerLost: a rank was lost meanwhile, and the group can't shrink.
        """
        raise_open_file_limit(_count_files(topology.dp_size))
        self._timing, self._join_s = read_lease_timing(os.environ), read_join_timeout(os.environ)
        self._departure = departure or Departure()
        self.rank, self.size = topology.dp_rank, topology.dp_size
        self._initial_rank = topology.dp_rank  # never changes; `rank` does when the group shrinks
        self._next_peer_check_s, self._is_closed = 0.0, False
        self._gather_thread = ThreadPoolExecutor(1, thread_name_prefix="gather")
        agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts_store = topology.is_rank_0 and not agent_keeps_store
        # torchrun ends and restarts all ranks when one dies; srun can leave the others alone.
        self.can_shrink = topology.launcher == "slurm"
        self.nodes = [""] * self.size
        self._join(topology, agent_keeps_store, lambda: end_stuck_process(before_exit))
        run_stages(self, [Stage("joining the other ranks", lambda: self._meet(topology))])

    @property
    def checked_store(self) -> CheckedStore:
        return CheckedStore(self.store, self.translate_errors)

    @property
    def num_shrinks(self) -> int:
        return self._membership.num_shrinks

    # ---- collectives

    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        tensor = torch.tensor(list(values), dtype=torch.int64)
        kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MIN
        with self.translate_errors():
            return _GlooReduce(self, dist.all_reduce(tensor, op=kind, async_op=True), tensor)

    def all_gather_object(self, value: Any) -> list[Any]:
        # dist.all_gather_object blocks, so a rank waiting in it would not notice that the group is broken.
        data = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait_for_work(lambda: dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        longest = max(int(size) for size in sizes)
        buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.nn.functional.pad(data, (0, longest - len(data)))
        self._wait_for_work(lambda: dist.all_gather(buffers, padded, async_op=True))
        pairs = zip(buffers, sizes, strict=True)
        return [decode(buffer[: int(size)].numpy().tobytes()) for buffer, size in pairs]

    def gather_object(self, value: Any, senders: Sequence[int] | None = None) -> list[Any] | None:
        # In a thread, since the call blocks even if a peer is lost.
        gathered = self._gather_thread.submit(gather_values, value, senders)
        with self.translate_errors():
            on_wait = self._wait_log.start()
            while True:
                try:
                    return gathered.result(_POLL_S)
                except TimeoutError:
                    self.raise_if_peer_failed()
                    on_wait()

    def all_reduce_any(self, mask: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(mask.astype("uint8"))
        self._wait_for_work(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True))
        return tensor.numpy().astype(bool)

    def all_reduce_sum(self, counts: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(counts.copy())
        self._wait_for_work(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=True))
        return tensor.numpy()

    # ---- failures

    def raise_if_peer_failed(self) -> None:
        self._leases.heartbeat()  # every wait for other ranks asks this
        now = time.monotonic()
        if now < self._next_peer_check_s:
            return
        self._next_peer_check_s = now + max(_PEER_CHECK_INTERVAL_S, self.size * _PEER_CHECK_INTERVAL_PER_RANK_S)
        with self.translate_errors():
            self._failures.raise_if_announced()
            if self._membership.is_shrinking():
                raise PeerLost("lost another rank (reported by a peer)")
            if self.rank > 0:
                self._raise_if_rank_0_stuck()
                return
            # Rank 0 watches for all: it leads every shrink, and the store serves 2 N leases, not N x N.
            expired = self._leases.find_expired(self._membership.members, self._timing.lease_s)
            if expired:
                phase, lease_s = self._wait_log.get_phase(expired[0]), self._timing.lease_s
                raise PeerLost(f"lost rank {expired[0]} (no heartbeat for {lease_s:.0f} s, last seen {phase})")

    def announce_failure(self, message: str, exit_status: int) -> bool:
        return self._failures.announce(message, exit_status)

    def first_failure_status(self) -> int | None:
        return self._failures.read_exit_status()

    def enter_phase(self, name: str, *, is_slow: bool = False) -> None:
        self._leases.enter_phase(is_slow=is_slow)
        with self.translate_errors():
            self._wait_log.set_phase(name)

    def heartbeat(self) -> None:
        self._leases.heartbeat()

    def reach_milestone(self, milestone: Milestone) -> None:
        key = f"{_MILESTONE}/{milestone}"
        if self.rank == 0:
            with contextlib.suppress(RuntimeError):  # the store is gone: no rank waits for the word
                self.store.set(key, "1")
            return
        on_wait, poll = self._wait_log.start(), StorePoll(self.size)
        with self.translate_errors():
            while not self.store.check([key]):
                self._check_rank_0()
                # Once the rows are gathered no rank needs another one but rank 0.
                if milestone == "gathered" and self._membership.is_shrinking():
                    raise PeerLost("lost another rank (reported by a peer)")
                on_wait()
                poll.sleep()

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn low-level errors of gloo and the store into the failure that a peer announced before it died."""
        try:
            yield
        except DpgenError:
            raise
        except RuntimeError as error:  # torch.distributed's errors are all RuntimeErrors
            if is_local_error(error):
                raise HostLimitReached(self._initial_rank, summarize_error(error)) from None
            raise self._failures.make_peer_error(lost=summarize_error(error)) from None

    # ---- shrinking and leaving

    def shrink(self) -> None:
        with self.translate_errors():
            members = self._membership.shrink()
        if self._initial_rank not in members:
            raise PeerFailed("the other ranks got no heartbeat from this one and removed it", EXIT_RESUMABLE)
        self.nodes = [self.nodes[self._membership.members.index(member)] for member in members]
        self._membership.members = members
        self.rank, self.size = members.index(self._initial_rank), len(members)
        forget_world()
        raise_open_file_limit(_count_files(self.size))  # gloo may close what it held a moment later
        self._connect()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._leases.stop()
        if self._hosts_store:
            self._keep_store_until_peers_leave()
        else:
            with contextlib.suppress(RuntimeError):  # the store is gone: no rank waits for this one to leave
                self.store.add(_DEPARTED, 1)
        # The process group ends with the process: destroying it waits for collectives in progress.

    # ---- joining

    def _join(self, topology: Topology, agent_keeps_store: bool, end_process: Callable[[], None]) -> None:
        is_local = topology.is_on_one_node  # nothing then listens to other machines
        host = LOOPBACK if is_local and not agent_keeps_store else topology.master_addr
        port = _find_store_port(topology, host, self._join_s)
        address = (host, port)
        if agent_keeps_store:
            wait_for_torchrun_store(address)
        if interface := "lo" if is_local else find_interface_to(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        try:
            self._base = self._open_store(address, agent_keeps_store)
            port = self._base.port
            self._key_prefix = f"dpgen/{self._join_rendezvous(topology)}"
            self.store = TimeoutStore(self._make_prefixed_store(), self._timing.lease_s)
            own_store = clone_store(self._make_prefixed_store(), self._timing.lease_s)
            # Before connecting: once the ranks are connected, all leases exist.
            self._leases = Leases(self.store, own_store, self.rank, timing=self._timing, end_process=end_process)
            if self.rank == 0:
                self._leases.create_for(range(self.size))
            self._failures = FailureBoard(self.store, self.rank)
            self._membership = Membership(
                self.store,
                self._leases,
                self.rank,
                self.size,
                broken_lease_s=self._timing.broken_lease_s,
                on_wait=self._on_shrink_wait,
            )
            self._wait_log = WaitLog(self.store, self.rank, lambda: self._membership.members)
            self.get_wait_s = lambda: self._wait_log.wait_s
        except (RuntimeError, ValueError, OSError) as error:
            raise JoinFailed(
                f"rank {self.rank} could not join the group of {self.size} ranks at "
                f"{host}:{port}: {summarize_error(error)}"
            ) from None

    def _open_store(self, address: Address, agent_keeps_store: bool) -> Any:
        return open_store(
            address,
            num_ranks=None if agent_keeps_store else self.size,
            is_host=self._hosts_store,
            # A launcher's store runs before its ranks do; rank 0's comes whenever rank 0 is started.
            connect_s=_AGENT_TIMEOUT_S if agent_keeps_store else self._join_s,
            answer_s=self._join_s,
        )

    def _join_rendezvous(self, topology: Topology) -> int:
        """Return the number of this start: a restarted job may find the store of an earlier one, with its keys."""
        with ExitStack() as until_joined:
            if topology.discovery_ports and topology.is_rank_0:
                host = LOOPBACK if topology.is_on_one_node else ""
                advertiser = StoreAdvertiser(topology.discovery_ports, topology.job, self._base.port, host)
                until_joined.enter_context(advertiser)
            store = TimeoutStore(self._base, self._timing.lease_s)
            on_round = partial(self._departure.prepare, self._base.clone, self.rank)
            return join_rendezvous(store, self.rank, self.size, self._join_s, topology.source, on_round)

    def _meet(self, topology: Topology) -> None:
        """Connect the ranks, all of which have arrived, and learn their nodes. Collective; after a loss once more."""
        if self.num_shrinks == 0:
            self._connect()
        self.nodes = name_nodes(self.all_gather_object((topology.node, read_boot_id())))

    def _connect(self) -> None:
        """Connect this rank to the other members. Collective.

        Raises:
            PeerLost: a member did not connect in time.
            HostLimitReached: this host has too few files or ports.
        """
        self._wait_log.begin_epoch(self.num_shrinks)
        store = add_prefix(self._make_prefixed_store(), f"epoch-{self.num_shrinks}")
        timeout_s = _CONNECT_TIMEOUT_S + _CONNECT_TIMEOUT_PER_RANK_S * self.size
        try:
            connect_world(self._base, store, self.rank, self.size, timeout_s)
        except RuntimeError as error:
            if is_local_error(error):
                raise HostLimitReached(self._initial_rank, summarize_error(error)) from None
            raise PeerLost(f"lost another rank while connecting ({summarize_error(error)})") from None

    def _make_prefixed_store(self) -> Any:
        return add_prefix(self._base, self._key_prefix)

    # ---- waiting

    def _wait_for_work(self, start: Callable[[], Any]) -> None:
        """Start a collective and wait for it, checking the other ranks meanwhile."""
        with self.translate_errors():
            on_wait, work = self._wait_log.start(), start()
            while not work.is_completed():
                self.raise_if_peer_failed()
                on_wait()
                time.sleep(_SHORT_POLL_S)
            work.wait()

    def _on_shrink_wait(self) -> None:
        if self.store.check([f"{_MILESTONE}/gathered"]):
            raise AllRowsGathered
        self._check_rank_0()

    def _check_rank_0(self) -> None:
        """Raise PeerFailed if waiting for rank 0 is in vain."""
        self._leases.heartbeat()
        self._failures.raise_if_announced()
        if self.rank > 0:
            self._raise_if_rank_0_stuck()

    def _raise_if_rank_0_stuck(self) -> None:
        """Raise StoreLost if rank 0 stopped renewing its lease: its store answers whatever its main thread does."""
        lease_s = self._timing.lease_s
        if self._leases.find_expired([0], lease_s):
            raise StoreLost(
                f"rank 0 is stuck ({self._wait_log.get_phase(0)}): no heartbeat for {lease_s:.0f} s. Its main thread "
                "made no progress for long before that, or its process was stopped. Rerun the same command to resume"
            )

    def _keep_store_until_peers_leave(self, limit_s: float = 10.0) -> None:
        """Keep the store up until the other ranks have left, `limit_s` at most: they may still read from it."""
        deadline_s = time.monotonic() + limit_s
        with contextlib.suppress(RuntimeError):
            while self.store.add(_DEPARTED, 0) < self.size - 1 and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)


class _GlooReduce:
    def __init__(self, group: GlooGroup, work: Any, tensor: torch.Tensor) -> None:
        self._group, self._work, self._tensor = group, work, tensor
        self._on_wait = group._wait_log.start()

    def done(self) -> bool:
        with self._group.translate_errors():
            if not self._work.is_completed():
                self._group.raise_if_peer_failed()
                self._on_wait()
                return False
            self._work.wait()  # raises the collective's error
            return True

    def result(self) -> list[int]:
        return [int(value) for value in self._tensor.tolist()]


def _count_files(num_ranks: int) -> int:
    return 64 + 4 * num_ranks  # an upper bound of what connecting takes: at rank 0 about 18 files, and 3 per rank


def _find_store_port(topology: Topology, host: str, limit_s: float) -> int:
    if topology.discovery_ports and not topology.is_rank_0:
        return discover_store(host, topology.discovery_ports, topology.job, limit_s)
    return topology.master_port  # 0 on rank 0 lets the kernel choose one
