"""Where rank 0's store is, where no launcher has set a port aside for it: under srun without MASTER_PORT.

Any port that ranks derive from the job's id may be somebody else's. So rank 0 lets the kernel choose the store's port,
and tells it, with the job's name, on the first port it can have of a few derived ones (`StoreAdvertiser`). The others ask on all
of those in turn (`discover_store`), and believe only an answer that names their job.

They don't look for the store itself: TCPStore's client waits without end, whatever its timeout, on a port whose owner
says nothing (torch 2.13), and can't tell one job's store from another's.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Sequence

from dpgen.distributed.ports import bind_first_free, format_ports
from dpgen.errors import DpgenError

_ANSWER_TIMEOUT_S = 2.0  # for a connection, and again for the answer; whoever is late is asked again
_ROUND_INTERVAL_S = 0.5
_MAX_RESPONSE_BYTES = 300
_POLL_S = 0.05


class StoreAdvertiser:
    """Tells whoever asks, from a thread, until it is closed.

    Args:
        ports: in order of preference.
        job: the job's name, which no other job has, nor this one after a restart.
        store_port: what to tell.

    Raises:
        DpgenError: no port can be had.
    """

    def __init__(self, ports: Sequence[int], job: str, store_port: int) -> None:
        self._listener = bind_first_free(ports)
        self._encode_response = _encode_response(job, store_port)
        self._closed = threading.Event()
        threading.Thread(target=self._serve, name="beacon", daemon=True).start()

    @property
    def port(self) -> int:
        """The port that could be had."""
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
            except OSError:  # closed; or the network's own trouble with whoever asked
                if self._closed.wait(_POLL_S):
                    return
                continue
            with connection, contextlib.suppress(OSError):
                connection.sendall(self._encode_response)  # so little never blocks


def discover_store(host: str, ports: Sequence[int], job: str, limit_s: float) -> int:
    """The port of the job's store on `host`, from its beacon on one of `ports`.

    Rank 0 may come up last, and a port that is free or a stranger's now may be its: all are asked, round after round.

    Raises:
        DpgenError: no beacon of this job answered within `limit_s`.
    """
    deadline_s = time.monotonic() + limit_s
    while True:
        for port in ports:
            store_port = _query(host, port, job)
            if store_port is not None:
                return store_port
        if time.monotonic() > deadline_s:
            raise DpgenError(
                f"rank 0 of {job} did not answer on {host}, ports {format_ports(ports)}, within "
                f"{limit_s / 60:.0f} minutes; was it started, and can it be reached from here?"
            )
        time.sleep(_ROUND_INTERVAL_S)


def _query(host: str, port: int, job: str) -> int | None:
    with contextlib.suppress(OSError), socket.create_connection((host, port), _ANSWER_TIMEOUT_S) as connection:
        said = connection.makefile("rb").readline(_MAX_RESPONSE_BYTES)
        match = re.search(rb" (\d{1,5})\n\Z", said)
        if match and said == _encode_response(job, int(match[1])):
            return int(match[1])
    return None


def _encode_response(job: str, store_port: int) -> bytes:
    return f"dpgen {job} store {store_port}\n".encode()
