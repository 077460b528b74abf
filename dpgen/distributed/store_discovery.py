"""Discover the port of rank 0's store if no launcher has reserved one: under srun without MASTER_PORT.

- Any port that ranks derive from the job's id may belong to another process. So the kernel chooses the store's port,
  and rank 0 advertises it, with the job's name, on the first free one of a few derived ports (`StoreAdvertiser`).
- The other ranks query all of those ports in turn (`discover_store`), and accept only a response that names their job.
- Ranks don't look for the store itself: TCPStore's client waits without end, whatever its timeout, on a port whose
  owner sends nothing (torch 2.13), and can't tell one job's store from another's.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Sequence

from dpgen.distributed.ports import bind_first_free, format_ports
from dpgen.errors import JoinFailed
from dpgen.log import log_while_waiting

logger = logging.getLogger(__name__)

_RESPONSE_TIMEOUT_S = 2.0  # for a connection, and again for the response; a late port is queried again
_ROUND_INTERVAL_S = 0.5
_MAX_RESPONSE_BYTES = 300
_POLL_S = 0.05


class StoreAdvertiser:
    """Send the store's port to every client that connects, from a thread, until closed.

    Args:
        ports: in order of preference.
        job: the job's name. No other job has it, and neither does a restart of this job.
        store_port: the port to advertise.
        host: the address to listen on; "" for every address.

    Raises:
        DpgenError: none of the ports is free.
    """

    def __init__(self, ports: Sequence[int], job: str, store_port: int, host: str = "") -> None:
        self._listener = bind_first_free(ports, host)
        self._response = _encode_response(job, store_port)
        self._closed = threading.Event()
        threading.Thread(target=self._serve, name="store-advertiser", daemon=True).start()

    @property
    def port(self) -> int:
        """The port that was free."""
        return int(self._listener.getsockname()[1])

    def __enter__(self) -> StoreAdvertiser:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread's accept(), which close() would not
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the listener is closed, or a client's network failed
                if self._closed.wait(_POLL_S):
                    return
                continue
            with connection, contextlib.suppress(OSError):
                connection.sendall(self._response)  # too short to block


def discover_store(host: str, ports: Sequence[int], job: str, limit_s: float) -> int:
    """Return the port of the job's store on `host`, as advertised on one of `ports`.

    Rank 0 may start last, and may then get a port that is free or another process's now. So all ports are queried, in
    round after round.

    Raises:
        JoinFailed: no port advertised this job's store within `limit_s`.
    """
    deadline_s = time.monotonic() + limit_s

    def describe() -> str:
        return (
            f"waiting for rank 0 of {job}: it has not answered on {host}, ports {format_ports(ports)}. Check that it "
            "was started, and that this host can reach it"
        )

    with log_while_waiting(logger, describe):
        while True:
            for port in ports:
                store_port = _query(host, port, job)
                if store_port is not None:
                    return store_port
            if time.monotonic() > deadline_s:
                raise JoinFailed(
                    f"rank 0 of {job} did not answer on {host}, ports {format_ports(ports)}, within "
                    f"{limit_s:,.0f} s (DPGEN_JOIN_TIMEOUT_S). Check that it was started, and that this host can reach "
                    "it"
                )
            time.sleep(_ROUND_INTERVAL_S)


def _query(host: str, port: int, job: str) -> int | None:
    with contextlib.suppress(OSError), socket.create_connection((host, port), _RESPONSE_TIMEOUT_S) as connection:
        response = connection.makefile("rb").readline(_MAX_RESPONSE_BYTES)
        match = re.search(rb" (\d{1,5})\n\Z", response)
        if match and response == _encode_response(job, int(match[1])):
            return int(match[1])
    return None


def _encode_response(job: str, store_port: int) -> bytes:
    return f"dpgen {job} store {store_port}\n".encode()
