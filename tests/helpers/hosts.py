"""Several hosts on one machine: network namespaces on one bridge, each with an address and a host name.

A host can be disconnected like by a pulled cable: no connection is closed, and nothing answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from helpers.requirements import skip_or_fail


class Hosts:
    """Make `number` hosts, and remove them at the end of the block.

    Args:
        folder: receives the /etc/hosts of each.
    """

    _num_made = 0

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self._folder = number, folder
        Hosts._num_made += 1  # the kernel removes a network with a delay, so the next one needs other names
        self._name = f"d{os.getpid()}-{Hosts._num_made}"
        # 198.18.0.0/15 is reserved for testing networks (RFC 2544); each test process takes its own subnet.
        self._net = f"198.18.{os.getpid() % 250 + 1}"
        self._cleanup = ExitStack()

    def __enter__(self) -> Hosts:
        try:
            self._connect()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _connect(self) -> None:
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
        """Return the command that runs `words` on a host, as the same process.

        Args:
            own_name_is_loopback: let the host's own name resolve to 127.0.1.1, as /etc/hosts does on Debian.
        """
        names = self._folder / f"hosts-{self._name}-{host}"
        names.write_text(
            "127.0.0.1 localhost\n"
            + "".join(
                f"{'127.0.1.1' if own_name_is_loopback and peer == host else self.address(peer)} host{peer}\n"
                for peer in range(self.number)
            )
        )
        # `ip netns exec` gives the command its own mounts, too.
        script = 'mount --bind "$1" /etc/hosts && hostname "$0" && shift && exec "$@"'
        enter = ["ip", "netns", "exec", self._space(host), "unshare", "--uts"]
        return [*enter, "sh", "-c", script, f"host{host}", str(names), *words]

    def disconnect(self, host: int) -> None:
        """Cut a host off from the others, as by a pulled cable."""
        _ip("link", "set", self._cable(host), "down")

    def _space(self, host: int) -> str:
        return f"{self._name}-{host}"

    def _cable(self, host: int) -> str:
        return f"{self._name}v{host}"


def hosts_or_skip(number: int, folder: Path) -> Iterator[Hosts]:
    """Yield the hosts to a fixture; without namespaces skip with the reason, or fail if DPGEN_REQUIRE_NETNS is set."""
    reason = _find_missing_requirement()
    if reason is not None:
        skip_or_fail(reason, "DPGEN_REQUIRE_NETNS")
    with Hosts(number, folder) as hosts:
        yield hosts


def _find_missing_requirement() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"there is no `{program}` here (Debian packages: iproute2, util-linux)"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"this machine allows no namespaces: {probe.stderr.strip()}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
