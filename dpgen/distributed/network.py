"""Prepare the host for joining a group: reach the store, find the interface to it, raise the open file limit.

The two retry loops are kept by hand: tenacity (9.2) would be a dependency for these lines alone.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import time

from dpgen.errors import ConfigError, JoinFailed
from dpgen.log import log_while_waiting

logger = logging.getLogger(__name__)

_RESOLVE_TIMEOUT_S = 300.0  # a name may be new: Kubernetes resolves a pod's once the pod runs
_RESOLVE_POLL_S = 0.5
_AGENT_TIMEOUT_S = 10.0
_POLL_S = 0.05
_LOCAL_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS)

Address = tuple[str, int]  # host, port
LOOPBACK = "127.0.0.1"


def wait_for_torchrun_store(address: Address) -> None:
    """Return once torchrun's store accepts a connection. It runs before its ranks do, unless torchrun has died since.

    TCPStore itself would retry for a minute, and then print a stack trace.

    Raises:
        JoinFailed: nothing accepted a connection for 10 s.
    """
    deadline_s = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            socket.create_connection(address, timeout=_AGENT_TIMEOUT_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise JoinFailed(
                    f"torchrun's store at {address[0]}:{address[1]} has not answered for {_AGENT_TIMEOUT_S:.0f} s. "
                    f"Check that torchrun still runs: {error}"
                ) from None
            time.sleep(_POLL_S)


def wait_until_resolved(host: str, source: str, limit_s: float = _RESOLVE_TIMEOUT_S) -> None:
    """Return once the name of rank 0's host resolves on this one.

    TCPStore itself would retry for half an hour, and say nothing.

    Args:
        source: the variables that `host` comes from, for messages.

    Raises:
        ConfigError: it did not resolve within `limit_s`, or is no name.
    """
    deadline_s, reason = time.monotonic() + limit_s, "no name server has answered yet"

    def describe() -> str:
        return (
            f"waiting for the name of rank 0's host, {host}, to resolve on this host: {reason} ({source}). Set "
            "MASTER_ADDR to a name or address of rank 0's host that all ranks can reach"
        )

    with log_while_waiting(logger, describe):
        while True:
            try:
                socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                return
            except UnicodeError as error:
                raise ConfigError(f"MASTER_ADDR={host!r} is no host name or address: {error} ({source})") from None
            except OSError as error:
                reason = error.strerror or str(error)
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"the name of rank 0's host, {host}, does not resolve on {socket.gethostname()}: {reason} "
                    f"({source}). Set MASTER_ADDR to a name or address of rank 0's host that all ranks can reach"
                )
            time.sleep(_RESOLVE_POLL_S)


def find_interface_to(address: Address) -> str | None:
    """Return the network interface by which this host reaches `address`, or which has it; None if that is loopback.

    Gloo itself takes the interface that the host's name resolves to. That is the loopback if /etc/hosts says so (as
    Debian's does) or if no server knows the name, and ranks on several hosts would never connect.
    """
    import psutil

    own = find_local_address_to(address)
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and any(entry.address.partition("%")[0] == own for entry in addresses):
            return str(name)
    return None


def find_local_address_to(address: Address) -> str:
    """Return this host's own address on the route to `address`; the loopback's if there is no route."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return LOOPBACK  # right for a world of one; in a larger one, joining reports the error


def raise_open_file_limit(extra: int) -> None:
    """Raise the soft limit of open files by `extra`, at most to the hard one: gloo holds about 20 + 2 x ranks each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + extra if hard == resource.RLIM_INFINITY else min(hard, soft + extra)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_local_error(error: Exception) -> bool:
    """Return True if this host's limits are the cause of a connection's error, so that no peer is to blame."""
    return any(os.strerror(number) in str(error) for number in _LOCAL_ERRORS)
