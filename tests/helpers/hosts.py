"""Hosts of their own on one machine: network namespaces with an address and a host name each, on one bridge.

A cable can be pulled: then nothing closes a connection, and nothing answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

REQUIRED = os.environ.get("DPGEN_REQUIRE_NETNS") == "1"


class Hosts:
    """So many hosts; `command(host, ...)` is what runs a command on one, as the same process.

    Args:
        folder: where to write their /etc/hosts.
    """

    _num_made = 0

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self._folder = number, folder
        Hosts._num_made += 1  # the kernel takes its time to remove a network: the next one has other names
        self._name = f"d{os.getpid()}-{Hosts._num_made}"
        # 198.18.0.0/15 is set apart for testing networks (RFC 2544); each test process takes a net of its own.
        self._net = f"198.18.{os.getpid() % 250 + 1}"
        self._cleanup = ExitStack()

    def __enter__(self) -> Hosts:
        try:
            self._lay()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _lay(self) -> None:
        self._add("link", self._name, "type", "bridge")
        _ip("link", "set", self._name, "up")
        for host in range(self.number):
            space, cable = self._space(host), self._cable(host)
            self._add("netns", space)
            self._add("link", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self._name, "up")
            _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def _add(self, kind: str, name: str, *words: str) -> None:
        _ip(kind, "add", name, *words)
        self._cleanup.callback(_ip, kind, "del", name)

    def address(self, host: int) -> str:
        return f"{self._net}.{host + 1}"

    def command(self, host: int, words: Sequence[str], *, own_name_is_loopback: bool = False) -> list[str]:
        """
        Args:
            own_name_is_loopback: what its own name resolves to, as on a Debian host, whose /etc/hosts says 127.0.1.1.
        """
        names = self._folder / f"hosts-{self._name}-{host}"
        names.write_text(
            "127.0.0.1 localhost\n"
            + "".join(
                f"{'127.0.1.1' if own_name_is_loopback and each == host else self.address(each)} host{each}\n"
                for each in range(self.number)
            )
        )
        # `ip netns exec` gives the command mounts of its own, too.
        begin = 'mount --bind "$1" /etc/hosts && hostname "$0" && shift && exec "$@"'
        enter = ["ip", "netns", "exec", self._space(host), "unshare", "--uts"]
        return [*enter, "sh", "-c", begin, f"host{host}", str(names), *words]

    def disconnect(self, host: int) -> None:
        _ip("link", "set", self._cable(host), "down")

    def _space(self, host: int) -> str:
        return f"{self._name}-{host}"

    def _cable(self, host: int) -> str:
        return f"{self._name}v{host}"


def hosts_or_skip(number: int, folder: Path) -> Iterator[Hosts]:
    """For a fixture: the hosts, or a skip with the reason; a failure where DPGEN_REQUIRE_NETNS=1."""
    reason = _lacking()
    if reason is None:
        with Hosts(number, folder) as hosts:
            yield hosts
    elif REQUIRED:
        pytest.fail(f"DPGEN_REQUIRE_NETNS=1, and {reason}")
    else:
        pytest.skip(reason)


def _lacking() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"there is no `{program}` (Debian: iproute2, util-linux)"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"this machine allows no namespaces: {probe.stderr.strip()}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
