"""Derive the ports of a SLURM job, and find a free one; `python -m dpgen.ports JOB STEP` prints the first free one.

- The ports follow from the job's id, so all its processes derive the same ones without communicating.
- Any of them may be taken, for example by another job on the node. So there are several, and a listener takes the
  first free one.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Sequence

from dpgen.errors import EXIT_FAILED, EXIT_OK, DpgenError

# Above the well-known ports, and below those that kernels assign to outgoing connections (from 32768 on Linux).
_BASE, _SPAN = 15_000, 15_000
_NUMBER, _STRIDE = 8, 1871  # a prime that does not divide the span, so the ports differ and lie far apart


def derive_job_ports(job: int, step: int) -> tuple[int, ...]:
    """Return the ports of a job's step, in order of preference."""
    first = job * 31 + step
    return tuple(_BASE + (first + index * _STRIDE) % _SPAN for index in range(_NUMBER))


def bind_first_free(ports: Sequence[int], host: str = "") -> socket.socket:
    """Listen on the first free one of `ports`.

    Args:
        host: an IPv4 address of this machine; "" for every address.

    Raises:
        DpgenError: none of them is free.
    """
    is_dualstack = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dualstack else socket.AF_INET
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=is_dualstack)
    raise DpgenError(f"none of the ports {format_ports(ports)} is free on this machine: set MASTER_PORT to a free one")


def format_ports(ports: Sequence[int]) -> str:
    """Return ``15310, 17181``."""
    return ", ".join(map(str, ports))


def main(arguments: Sequence[str]) -> int:
    """Print a free port of the job, and return the exit status."""
    job, step = map(int, arguments)
    try:
        with bind_first_free(derive_job_ports(job, step)) as listener:
            print(listener.getsockname()[1])
    except DpgenError as error:
        print(f"dpgen: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
