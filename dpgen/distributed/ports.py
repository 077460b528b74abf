"""Ports of a SLURM job: which ones, and which of them is free here: `python -m dpgen.ports JOB STEP` prints it.

They follow from the job's id, so that all its processes find the same by themselves. Each may be somebody else's, of
another job on the same node for one; so there are several, and whoever listens takes the first that it can have.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Sequence

from dpgen.errors import EXIT_FAILED, EXIT_OK, DpgenError

# Above the well-known ones, and below the range that kernels hand out to outgoing connections (32768 on Linux).
_BASE, _SPAN = 15_000, 15_000
_NUMBER, _STRIDE = 8, 1871  # a prime that does not divide the span: the ports differ, and lie far apart


def derive_job_ports(job: int, step: int) -> tuple[int, ...]:
    """Ports of a job's step, in order of preference."""
    first = job * 31 + step
    return tuple(_BASE + (first + index * _STRIDE) % _SPAN for index in range(_NUMBER))


def bind_first_free(ports: Sequence[int]) -> socket.socket:
    """Listens, on every address of this machine, on the first of `ports` that can be had.

    Raises:
        DpgenError: none can.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    raise DpgenError(f"none of the ports {format_ports(ports)} is free on this machine; set MASTER_PORT to one that is")


def format_ports(ports: Sequence[int]) -> str:
    """For people."""
    return ", ".join(map(str, ports))


def main(arguments: Sequence[str]) -> int:
    """Prints a free port of the job's; the exit status."""
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
