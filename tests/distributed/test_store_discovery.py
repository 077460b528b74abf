"""Discovering rank 0's store on ports that other processes may have taken."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from helpers.jobs import free_port, wait_for

from dpgen.distributed.store_discovery import StoreAdvertiser, discover_store
from dpgen.errors import DpgenError

JOB = "SLURM job 7, step 0, restart 0"


@contextlib.contextmanager
def foreign_port(response: bytes | None) -> Iterator[int]:
    """Yield a port of another process, which sends `response` to every client, or never answers if it is None."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(response or b"")

        if response is not None:
            threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "response",
    [
        None,
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00\xff" * 5000,
        b"dpgen SLURM job 77, step 0, restart 0 store 41234\n",
        b"dpgen SLURM job 7, step 0, restart 1 store 41234\n",
        b"dpgen SLURM job 7, step 0, restart 0 store 4123",
    ],
    ids=["silent", "closes", "http", "binary", "another job", "another restart", "half a response"],
)
def test_a_port_of_another_process_is_skipped(response: bytes | None) -> None:
    with foreign_port(response) as taken:
        ports = [taken, free_port(), free_port()]
        with StoreAdvertiser(ports, JOB, 41234) as advertiser:
            assert advertiser.port == ports[1], "rank 0 takes the first free port"
            assert discover_store("127.0.0.1", ports, JOB, 30) == 41234
        with pytest.raises(DpgenError, match=f"rank 0 of {JOB} did not answer on 127.0.0.1, ports {taken}, "):
            discover_store("127.0.0.1", ports, JOB, 0)


def test_rank_0_may_start_last_and_the_others_say_that_they_wait_for_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpgen.log._FIRST_NOTICE_S", 0.0)
    ports, discovered = [free_port()], []
    client = threading.Thread(target=lambda: discovered.append(discover_store("localhost", ports, JOB, 30)))
    client.start()
    wait_for(lambda: bool(caplog.messages))
    assert f"waiting for rank 0 of {JOB}: it has not answered on localhost, ports {ports[0]}. Check" in caplog.text
    with StoreAdvertiser(ports, JOB, 5):
        client.join(30)
    assert discovered == [5]


def test_many_ranks_query_at_once_and_some_disconnect() -> None:
    ports, discovered = [free_port()], []
    with StoreAdvertiser(ports, JOB, 5) as advertiser:
        for _ in range(50):
            socket.create_connection(("127.0.0.1", advertiser.port)).close()
        clients = [
            threading.Thread(target=lambda: discovered.append(discover_store("127.0.0.1", ports, JOB, 30)))
            for _ in range(50)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(30)
    assert discovered == [5] * 50


def test_if_every_port_is_taken_the_error_of_rank_0_says_what_to_set() -> None:
    with foreign_port(None) as first, foreign_port(None) as second:
        with pytest.raises(DpgenError, match=rf"the ports {first}, {second} is free .* set MASTER_PORT"):
            StoreAdvertiser([first, second], JOB, 5)
