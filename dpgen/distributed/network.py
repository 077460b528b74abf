"""What joining a group asks of the host: a way to the store, the interface that leads there, files enough."""

from __future__ import annotations

import resource
import socket
import time

from dpgen.errors import DpgenError

_AGENT_TIMEOUT_S = 10.0
_POLL_S = 0.05

Address = tuple[str, int]  # host, port


def wait_for_torchrun_store(address: Address) -> None:
    """Meets torchrun's store, which is up before its ranks are, or finds that torchrun has died since.

    TCPStore itself would go on trying for a minute, and then print a stack of its own.

    Raises:
        DpgenError: nothing answered for 10 s.
    """
    deadline_s = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            socket.create_connection(address, timeout=_AGENT_TIMEOUT_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise DpgenError(
                    f"torchrun's store at {address[0]}:{address[1]} does not answer ({error}); has torchrun died?"
                ) from None
            time.sleep(_POLL_S)


def find_interface_to(address: Address) -> str | None:
    """The network interface that this host reaches `address` by, or has it on; None on a host that is alone.

    Gloo takes the one that the host's name resolves to, and that is the loopback on hosts whose /etc/hosts says so
    (as Debian's does) and on those whose name nobody knows: their ranks would never meet.
    """
    import psutil

    own = find_local_address_to(address)
    for name, found in psutil.net_if_addrs().items():
        if name != "lo" and any(each.address.partition("%")[0] == own for each in found):
            return str(name)
    return None


def find_local_address_to(address: Address) -> str:
    """This host's own address on the way to `address`; the loopback's where that leads nowhere."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"  # a world of one; in another, joining says what is wrong


def raise_open_file_limit(extra: int) -> None:
    """Raises the soft limit of open files towards the hard one: gloo holds about 20 + 2 x ranks a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + extra if hard == resource.RLIM_INFINITY else min(hard, soft + extra)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
