"""Count what a group of ranks costs the store and rank 0; see scale.py, which runs this program.

    python benchmarks/scale_ranks.py formation 64          # real processes, connected by gloo
    python benchmarks/scale_ranks.py addresses 1000        # stand-ins that form a group
    python benchmarks/scale_ranks.py leases 4096 20        # stand-ins whose leases rank 0 watches for 20 s

A stand-in is a `GlooGroup` that does everything but gloo's connections and collectives: it joins the rendezvous, renews
its lease and exchanges an address by the product's own functions. Up to 128 stand-ins share a process, so that one
machine holds thousands. Rank 0 has a process of its own.

Traffic is the kernel's own count for each connection to the store (TCP_INFO), so nothing stands between a rank and the
store. No name server is asked: torch looks for the name of each address it connects to, and a thousand ranks of one
machine are more than its server answers. Prints one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

os.environ.setdefault("RES_OPTIONS", "attempts:0")  # of the C library's resolver: see above
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or torch says so for each address

import torch
import torch.distributed as dist

from dpgen.distributed.gloo import rank_group
from dpgen.distributed.gloo.address_book import AddressBook
from dpgen.distributed.gloo.rank_group import GlooGroup
from dpgen.distributed.topology import Topology
from dpgen.scheduling.progress.throughput import compute_slowdowns
from dpgen.scheduling.progress.totals import Totals

_STAND_INS_PER_PROCESS = 128
_SWITCH_INTERVAL_S = 0.05  # between threads that compute: each that waits for its turn wakes up as often
_ADDRESS_BYTES = 154  # of gloo's address of a rank (torch 2.13), with a host name of two letters
_RANKS_PER_NODE = 8
_KEYS_PER_QUESTION = 128  # that gloo asks for at a time
_JOINED = "scale/joined"  # store key: the number of stand-ins that have joined
_SYNC_INTERVAL_S = 1.0
_LOOP_INTERVAL_S = 0.01
_TCP_INFO = struct.Struct("=104x 16x Q Q I I I I I I")  # linux/tcp.h, from tcpi_bytes_acked on


def main() -> None:
    kind, num_ranks, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if kind == "formation":
        measured = form_group(int(num_ranks))
    else:
        rank_group.connect_world = _exchange_addresses if kind == "addresses" else _connect_nothing  # type: ignore[attr-defined]
        measured = run_stand_ins(int(num_ranks), float(rest[0]) if rest else 0.0)
    print(json.dumps(measured), flush=True)
    os._exit(0)  # as dpgen exits: native threads may abort the interpreter's regular exit


# ---- real ranks


def form_group(num_ranks: int) -> dict[str, Any]:
    """Start ranks as processes, and return what forming their group took.

    Returns:
        seconds from the start of all ranks to the last one's joining, bytes and messages between the ranks and the
        store, and rank 0's open files.
    """
    port = _find_free_port()

    def join(rank: int) -> dict[str, Any]:
        started_s, num_files = time.monotonic(), _count_files()
        GlooGroup(_make_topology(rank, num_ranks, port))
        return {
            "rank": rank,
            "seconds": time.monotonic() - started_s,
            "files": _count_files() - num_files,
            **(_read_store_traffic(port) if rank else {}),
        }

    with _fork([lambda rank=rank: join(rank) for rank in range(num_ranks)]) as results:  # type: ignore[misc]
        ranks = sorted(results, key=lambda result: int(result["rank"]))
    return {
        "ranks": num_ranks,
        "seconds": max(rank["seconds"] for rank in ranks),
        "bytes": sum(rank["bytes"] for rank in ranks[1:]),
        "messages": sum(rank["messages"] for rank in ranks[1:]),
        "rank_0_files": ranks[0]["files"],
    }


# ---- stand-ins


class StandInGroup(GlooGroup):
    """Join a group as a rank does, but for gloo's connections."""

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value] * self.size


def run_stand_ins(num_ranks: int, seconds: float) -> dict[str, Any]:
    """Let stand-ins form a group; then watch rank 0's main thread while it watches their leases and syncs totals.

    Returns:
        seconds until the last one has joined, bytes and messages of forming the group, rank 0's processor time and open
        files, and the fractions of `seconds` during which rank 0's main thread was busy with leases and totals.
    """
    port = _find_free_port()
    others = list(range(1, num_ranks))
    parts = [others[start : start + _STAND_INS_PER_PROCESS] for start in range(0, len(others), _STAND_INS_PER_PROCESS)]
    jobs: list[Callable[[], dict[str, Any]]] = [lambda: _lead_stand_ins(num_ranks, port, seconds)]
    jobs += [lambda part=part: _join_stand_ins(part, num_ranks, port) for part in parts]  # type: ignore[misc]
    measured: dict[str, Any] = {"ranks": num_ranks, "bytes": 0, "messages": 0, "formation_s": 0.0}
    with _fork(jobs) as results:
        for result in results:
            for name in ("bytes", "messages"):
                measured[name] += result.pop(name, 0)
            measured["formation_s"] = max(measured["formation_s"], result.pop("formation_s"))
            measured |= result
    return measured


def _join_stand_ins(ranks: Sequence[int], num_ranks: int, port: int) -> dict[str, Any]:
    threading.stack_size(1 << 18)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    started_s = time.monotonic()
    with ThreadPoolExecutor(len(ranks)) as pool:
        groups = list(pool.map(lambda rank: StandInGroup(_make_topology(rank, num_ranks, port)), ranks))
    _KEPT.extend(groups)  # they renew their leases until the process ends
    joined = {"formation_s": time.monotonic() - started_s, **_read_store_traffic(port)}
    groups[0].store.add(_JOINED, len(groups))
    return joined


def _lead_stand_ins(num_ranks: int, port: int, seconds: float) -> dict[str, Any]:
    started_s, num_files = time.monotonic(), _count_files()
    cpu_s, process_s = time.thread_time(), time.process_time()
    group = StandInGroup(_make_topology(0, num_ranks, port))
    _KEPT.append(group)
    joined = {
        "formation_s": time.monotonic() - started_s,
        "formation_cpu_s": time.thread_time() - cpu_s,
        "formation_process_s": time.process_time() - process_s,
        "rank_0_files": _count_files() - num_files,
    }
    if seconds == 0:
        return joined
    while group.store.add(_JOINED, 0) < num_ranks - 1:  # ranks of their own cores would have joined by now
        time.sleep(0.1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return joined | _watch_main_thread(group, seconds)


def _watch_main_thread(group: GlooGroup, seconds: float) -> dict[str, Any]:
    """Do what rank 0's loop does for leases and totals, and return the fractions of the time that this takes.

    Returns:
        by "leases" and "totals", the processor time of the main thread and of the thread that asks the store for it;
        "wait_fraction", the seconds of both, with all waits for the store and for a core.
    """
    store_thread = next(iter(group.store._thread._threads)).ident
    assert store_thread is not None
    store_clock = time.pthread_getcpuclockid(store_thread)
    values = Totals().as_list(0, group.size, 1000)
    busy_s = dict.fromkeys(("leases", "totals", "wait"), 0.0)
    started_s, cpu_s = time.monotonic(), time.thread_time()

    @contextmanager
    def busy(name: str) -> Iterator[None]:
        begin_s, begin_cpu_s = time.monotonic(), time.thread_time() + time.clock_gettime(store_clock)
        yield
        busy_s[name] += time.thread_time() + time.clock_gettime(store_clock) - begin_cpu_s
        busy_s["wait"] += time.monotonic() - begin_s

    next_sync_s = started_s
    while (now := time.monotonic()) < started_s + seconds:
        with busy("leases"):  # as a collective that is under way asks, at each turn of the loop
            group.heartbeat()
            group.raise_if_peer_failed()
        if now >= next_sync_s:
            next_sync_s = now + _SYNC_INTERVAL_S
            with busy("totals"):
                values = Totals().as_list(0, group.size, 1000)
                pending = group.all_reduce_async(values, "sum")
            while not pending.done():
                time.sleep(0)
            with busy("totals"):
                compute_slowdowns(Totals.from_list(pending.result()).rates)
        time.sleep(_LOOP_INTERVAL_S)
    elapsed_s = time.monotonic() - started_s
    fractions = {f"{name}_fraction": value / elapsed_s for name, value in busy_s.items()}
    return fractions | {"loop_cpu_fraction": (time.thread_time() - cpu_s) / elapsed_s}


def _exchange_addresses(base: Any, store: Any, rank: int, size: int, timeout_s: float) -> None:
    """Exchange addresses as gloo does, with as many bytes; stands in for `connect_world`."""
    base.set_timeout(timedelta(seconds=timeout_s))
    book = AddressBook(store, rank, size)
    node = rank // _RANKS_PER_NODE
    host = bytes([10, 0, node // 256, node % 256])
    address = struct.pack("<Q2sQHH4s120xQ", 2, b"vm", 136, socket.AF_INET, 20000 + rank, host, rank)
    assert len(address) == _ADDRESS_BYTES
    book.set(f"0//cpu//0/{rank}", address)
    for start in range(0, size, _KEYS_PER_QUESTION):
        keys = [f"0//cpu//0/{peer}" for peer in range(start, min(size, start + _KEYS_PER_QUESTION))]
        assert all(book.multi_get(keys))


def _connect_nothing(base: Any, store: Any, rank: int, size: int, timeout_s: float) -> None:
    """Stand in for `connect_world` where only leases matter."""


_KEPT: list[GlooGroup] = []


# ---- processes and connections


@contextmanager
def _fork(jobs: Sequence[Callable[[], dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Run each job in a process of its own, all starting together, and yield the results once all are there.

    The processes stay until then: a rank that exits would be missed by the others.
    """
    start, result = os.pipe(), os.pipe()
    children = []
    for job in jobs:
        if (child := os.fork()) == 0:
            _run_child(job, start, result)
        children.append(child)
    os.close(result[1])
    os.close(start[1])  # all children read the end of this pipe, and start
    try:
        with os.fdopen(result[0]) as lines:
            yield [_check_result(json.loads(line)) for _, line in zip(jobs, lines, strict=False)]
    finally:
        for child in children[::-1]:  # rank 0's last: the others would report that it is gone
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _check_result(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        sys.exit(f"a process failed: {result['error']}")
    return result


def _run_child(job: Callable[[], dict[str, Any]], start: tuple[int, int], result: tuple[int, int]) -> None:
    os.close(start[1])
    os.read(start[0], 1)
    try:
        outcome = job()
    except BaseException as error:  # noqa: BLE001 - the end of a process: nothing may pass
        outcome = {"error": f"{type(error).__name__}: {error}"}
    os.write(result[1], json.dumps(outcome).encode() + b"\n")
    signal.pause()


def _make_topology(rank: int, num_ranks: int, port: int) -> Topology:
    address = {"master_addr": "127.0.0.1", "master_port": port}
    return Topology(rank, num_ranks, rank, num_ranks, "node", "slurm", **address)  # type: ignore[arg-type]


def _find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _count_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _read_store_traffic(port: int) -> dict[str, int]:
    """Return bytes in both directions, and requests, of this process's connections to the store."""
    num_bytes = num_messages = 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry))) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.getpeername()[1] != port:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            acked, received, _, _, _, _, _, segments_out = _TCP_INFO.unpack(info)
            num_bytes += acked + received
            num_messages += segments_out
    return {"bytes": num_bytes, "messages": num_messages}


if __name__ == "__main__":
    main()
