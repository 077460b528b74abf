"""Finding rank 0's store among ports that may be anybody's."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from helpers.jobs import free_port

from dpgen.distributed.store_discovery import StoreAdvertiser, discover_store
from dpgen.errors import DpgenError

JOB = "SLURM job 7, step 0, restart 0"


@contextlib.contextmanager
def stranger(says: bytes | None) -> Iterator[int]:
    """Somebody else's port; it answers with `says` to whoever connects, or with nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(says or b"")

        if says is not None:
            threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "says",
    [
        None,
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00\xff" * 5000,
        b"dpgen SLURM job 77, step 0, restart 0 store 41234\n",
        b"dpgen SLURM job 7, step 0, restart 1 store 41234\n",
        b"dpgen SLURM job 7, step 0, restart 0 store 4123",
    ],
    ids=["silent", "closes", "http", "binary", "another job", "another restart", "half an answer"],
)
def test_a_strangers_port_is_passed_by(says: bytes | None) -> None:
    with stranger(says) as taken:
        ports = [taken, free_port(), free_port()]
        with StoreAdvertiser(ports, JOB, 41234) as beacon:
            assert beacon.port == ports[1], "the first one that is free"
            assert discover_store("127.0.0.1", ports, JOB, 30) == 41234
        with pytest.raises(DpgenError, match=f"rank 0 of {JOB} did not answer on 127.0.0.1, ports {taken}, "):
            discover_store("127.0.0.1", ports, JOB, 0)


def test_rank_0_may_come_last() -> None:
    ports, found = [free_port()], []
    asking = threading.Thread(target=lambda: found.append(discover_store("localhost", ports, JOB, 30)))
    asking.start()
    time.sleep(1)
    with StoreAdvertiser(ports, JOB, 5):
        asking.join(30)
    assert found == [5]


def test_many_ask_at_once_and_some_hang_up() -> None:
    ports, found = [free_port()], []
    with StoreAdvertiser(ports, JOB, 5) as beacon:
        for _ in range(50):
            socket.create_connection(("127.0.0.1", beacon.port)).close()
        asking = [
            threading.Thread(target=lambda: found.append(discover_store("127.0.0.1", ports, JOB, 30)))
            for _ in range(50)
        ]
        for each in asking:
            each.start()
        for each in asking:
            each.join(30)
    assert found == [5] * 50


def test_where_every_port_is_taken_rank_0_says_what_to_do() -> None:
    with stranger(None) as first, stranger(None) as second:
        with pytest.raises(DpgenError, match=rf"the ports {first}, {second} is free .* set MASTER_PORT"):
            StoreAdvertiser([first, second], JOB, 5)
