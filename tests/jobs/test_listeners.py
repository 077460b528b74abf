"""Where a job listens: on one node nobody outside the machine can connect to it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from helpers.jobs import Job, Launcher, WriteConfig, make_numbered_rows
from helpers.results import load_all_rows

pytestmark = [pytest.mark.multi, pytest.mark.slow]

ENGINE = {"step_s": 0.02, "max_num_seqs": 4}  # the job generates for a second


def watch_listeners(jobs: Sequence[Job], *, with_launchers: bool) -> set[tuple[str, str]]:
    """Return where the jobs' processes listen until all jobs end, as (the process's module, IP address)."""
    listeners = set()
    while any(job.process.poll() is None for job in jobs):
        for job in jobs:
            for process, command in list_processes(job.process.pid, with_launchers=with_launchers):
                with contextlib.suppress(psutil.Error):
                    addresses = [
                        str(connection.laddr.ip)
                        for connection in process.net_connections("tcp")
                        if connection.status == psutil.CONN_LISTEN
                    ]
                    if addresses:
                        module = "engine" if "dpgen.engine.server" in command else "rank"
                        listeners |= {(module, address) for address in addresses}
        time.sleep(0.02)
    return listeners


def list_processes(launcher_pid: int, *, with_launchers: bool) -> Iterator[tuple[psutil.Process, list[str]]]:
    """Yield the processes below a launcher, with their commands.

    A child that has not called exec yet has its parent's sockets and command; while it calls it, it has no command.
    """
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process(launcher_pid)
        own_command = launcher.cmdline()
        if with_launchers:
            yield launcher, own_command
        for process in launcher.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if command and command != own_command:
                    yield process, command


def find_outside_address() -> str:
    """Return an address of this machine that other machines can reach; loopback's if it has none."""
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback:
                return str(entry.address)
    return "127.0.0.1"


def test_ranks_that_srun_starts_on_one_node_listen_on_loopback_only(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(60), engine=ENGINE)
    jobs = launcher.start_like_srun(
        "run", conf, rank_arguments=[[], []], MASTER_ADDR=find_outside_address(), MASTER_PORT=""
    )
    listeners = watch_listeners(jobs, with_launchers=True)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    assert listeners == {("rank", "127.0.0.1")}  # the store and gloo
    load_all_rows(tmp_path / "run", 60)


def test_under_torchrun_on_one_node_only_torchruns_own_store_is_open(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(60), engine=ENGINE)
    one_engine = ["parallel.launcher=external", "parallel.tensor_parallel_size=2"]
    job = launcher.dpgen("run", conf, *one_engine, ranks=2)
    listeners = watch_listeners([job], with_launchers=False)
    assert job.wait() == 0, job.output
    assert listeners == {("rank", "127.0.0.1"), ("engine", "127.0.0.1")}
    load_all_rows(tmp_path / "run", 60)
