"""Open the store, connect the ranks by gloo, and forget a world whose ranks are lost: the setup of torch.distributed.

- torch.distributed has one world in a process. `connect_world` makes it, and `forget_world` lets another be made.
- A timeout is for connecting only: connected ranks wait for each other however long it takes.
- torch's object collectives pickle. Here they encode by `dpgen.distributed.codec`, so that a stranger who reaches a
  port can't run code.
- Ranks find each other's addresses in one value of the store (`AddressBook`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dpgen.distributed.codec import decode, encode
from dpgen.distributed.gloo.address_book import AddressBook
from dpgen.distributed.network import LOOPBACK, Address
from dpgen.errors import DpgenError
from dpgen.log import log_while_waiting

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SILENCE_S = 10.0  # how much longer than torch's own timeout to wait
_BACKLOG = 2048  # torch's own
_NO_TIMEOUT = timedelta(days=20)  # gloo counts milliseconds in a signed 32-bit integer: 24.8 days at most
# Process groups whose collectives never end, kept until the process ends: destroying them would wait for those.
_LEAKED_GROUPS: list[Any] = []
# Without these, gloo (torch 2.13) sends 8 N^3 bytes through the store, and asks for one key at a time. All ranks must
# set them alike.
_GLOO_VARIABLES = ("GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER", "GLOO_ENABLE_STORE_V2_API")
# Stores that gloo keeps using: torch keeps only the C++ part of a store that is written in Python.
_ADDRESS_BOOKS: list[Any] = []
_connections: dict[
    int, str
] = {}  # file descriptors of the world's connections, and the kernel's names of their sockets


def open_store(address: Address, *, num_ranks: int | None, is_host: bool, connect_s: float, answer_s: float) -> Any:
    """Return a TCPStore at `address`, of which one process is the host.

    Args:
        address: with `LOOPBACK`, the host listens there alone; otherwise on every address, as torch does.
        num_ranks: None if the store is torchrun's.
        connect_s: how long to wait for the host.
        answer_s: how long to wait for keys.

    Raises:
        RuntimeError, OSError: the port is taken, or the host did not answer in time.
    """
    listener = None
    if is_host and address[0] == LOOPBACK:
        listener = socket.create_server(address, backlog=_BACKLOG)
        address = (LOOPBACK, listener.getsockname()[1])
    host, port = address

    def describe() -> str:
        if is_host:
            return f"waiting for this rank's own store: is {host} (MASTER_ADDR) an address of this host?"
        return (
            f"waiting for rank 0, whose store does not answer at {host}:{port} (MASTER_ADDR, MASTER_PORT). Check that "
            "rank 0 was started, and that this host can reach it"
        )

    def connect() -> Any:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            num_ranks,
            is_master=is_host,
            timeout=timedelta(seconds=connect_s),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=None if listener is None else listener.detach(),  # the store closes it
        )

    with log_while_waiting(logger, describe):
        store = _call_within(connect_s + _SILENCE_S, connect)
    store.set_timeout(timedelta(seconds=answer_s))
    return store


def clone_store(store: Any, limit_s: float) -> Any:
    """Return another connection to a store.

    Raises:
        RuntimeError: the store's host is gone, or does not answer.
    """
    return _call_within(limit_s, store.clone)


def _call_within(limit_s: float, action: Callable[[], T]) -> T:
    """Return `action()`, called in a thread: torch's own timeouts don't cover a host that is stopped and says nothing.

    Raises:
        RuntimeError: it has not returned within `limit_s`; the thread is left behind.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            outcome.set_exception(error)

    threading.Thread(target=run, name="connect", daemon=True).start()
    try:
        return outcome.result(limit_s)
    except FutureTimeoutError:
        raise RuntimeError(f"no answer within {limit_s:.0f} s, as from a process that is stopped") from None


def add_prefix(store: Any, prefix: str) -> Any:
    """Return the store with all its keys below a prefix."""
    return c10d.PrefixStore(prefix, store)


def connect_world(base: Any, store: Any, rank: int, size: int, timeout_s: float) -> None:
    """Connect this rank to all others by gloo. Collective.

    Args:
        base: the TCPStore.
        store: `base` under a prefix that no other world has.

    Raises:
        DpgenError: this torch has no place for another encoding than pickle.
        RuntimeError: not all ranks connected in time.
    """
    _replace_pickle()
    if dist.is_initialized():
        forget_world()  # of an earlier job of this process
    timeout = timedelta(seconds=timeout_s)
    base.set_timeout(timeout)  # ranks find each other through the store, within its timeout
    before = _list_connections(base.port)
    message = (
        f"waiting until all {size:,} ranks are connected with each other, by the network interface "
        f"{os.environ.get('GLOO_SOCKET_IFNAME', 'of the host name')} (GLOO_SOCKET_IFNAME)"
    )
    try:
        with _set_gloo_variables(), log_while_waiting(logger, lambda: message):
            _ADDRESS_BOOKS.append(book := AddressBook(store, rank, size))
            _call_within(
                timeout_s + _SILENCE_S,
                lambda: dist.init_process_group("gloo", store=book, rank=rank, world_size=size, timeout=timeout),
            )
    finally:
        _connections.clear()
        _connections.update(_list_connections(base.port).items() - before.items())
    c10d._set_pg_timeout(_NO_TIMEOUT)  # from now on slow ranks are waited for
    base.set_timeout(_NO_TIMEOUT)


def gather_values(value: Any, senders: Sequence[int] | None = None) -> list[Any] | None:
    """Return the ranks' values on rank 0, with None for those that are no senders; None elsewhere. Collective; blocks.

    torch's `gather_object` pads each rank's object to the largest one, so that a few large ones would take as much as
    large ones of all ranks. Senders that are named send theirs directly, over the connections that all ranks have.

    Args:
        senders: see `RankGroup.gather_object`.

    Raises:
        RuntimeError: a connection was closed, for example by `forget_world`.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    values: list[Any] | None = [None] * size if rank == 0 else None
    if senders is None:
        dist.gather_object(value, values, dst=0)
    elif values is not None:
        for sender in senders:
            values[sender] = _receive_object(sender) if sender else value
    elif rank in senders:
        data = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), 0)
        dist.send(data, 0)
    return values


def _receive_object(sender: int) -> Any:
    num_bytes = torch.zeros(1, dtype=torch.int64)
    dist.recv(num_bytes, sender)
    data = torch.empty(int(num_bytes), dtype=torch.uint8)
    dist.recv(data, sender)
    return decode(data.numpy().tobytes())


def forget_world() -> None:
    """Make torch.distributed forget its world, so that `connect_world` may be called again.

    Destroying the world instead would wait for collectives that never end, and torch 2.13 has no public way to forget
    it. Shutting its connections down makes gloo close them: otherwise each lost rank costs rank 0 a file per rank.
    """
    for descriptor, name in _connections.items():
        with contextlib.suppress(OSError), _borrow_socket(descriptor, name) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    _connections.clear()
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


def summarize_error(error: Exception) -> str:
    """Return the first line of a library's error, without its place in the source, its advice and its jokes."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.rpartition("] ")[2].partition(". This is typically")[0]


class _Encoder:
    """Stand in for `pickle.Pickler` in torch's object collectives."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def dump(self, value: Any) -> None:
        self._file.write(encode(value))


class _Decoder:
    """Stand in for `pickle.Unpickler` in torch's object collectives."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def load(self) -> Any:
        return decode(self._file.read())


def _replace_pickle() -> None:
    """Make torch's object collectives of this process, `gather_object` among them, use dpgen's encoding.

    Raises:
        DpgenError: they do not look up the two classes where torch 2.13 does.
    """
    for function, name, stand_in in (
        ("_object_to_tensor", "_pickler", _Encoder),
        ("_tensor_to_object", "_unpickler", _Decoder),
    ):
        code = getattr(getattr(c10d, function, None), "__code__", None)
        if not hasattr(c10d, name) or code is None or name not in code.co_names:
            raise DpgenError(
                f"torch {torch.__version__} can't gather objects without unpickling what other hosts send "
                f"(torch.distributed.distributed_c10d has no {function} with {name}): install torch 2.13"
            )
        setattr(c10d, name, stand_in)


@contextmanager
def _set_gloo_variables() -> Iterator[None]:
    """Set gloo's variables within the block, unless the user has; engines do not inherit them."""
    names = [name for name in _GLOO_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def _list_connections(store_port: int) -> dict[int, str]:
    """Return this process's TCP connections, except those to the store: descriptors, and the kernel's names."""
    connections = {}
    with contextlib.suppress(OSError):  # no file is left to read the list with
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile, no socket, or not connected
                name = os.readlink(f"/proc/self/fd/{entry}")
                with _borrow_socket(int(entry), name) as connection:
                    if connection.family not in (socket.AF_INET, socket.AF_INET6):
                        continue
                    if store_port not in (connection.getpeername()[1], connection.getsockname()[1]):
                        connections[int(entry)] = name
    return connections


@contextmanager
def _borrow_socket(descriptor: int, name: str) -> Iterator[socket.socket]:
    """Yield the socket of a descriptor, which another part of the process owns and closes.

    Raises:
        OSError: the descriptor is closed, or stands for something else by now.
    """
    if not name.startswith("socket:") or os.readlink(f"/proc/self/fd/{descriptor}") != name:
        raise OSError(f"descriptor {descriptor} is not {name}")
    borrowed = socket.socket(fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()
