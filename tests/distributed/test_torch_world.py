"""Connecting again after a loss: the connections of the world that was forgotten are closed."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from helpers.jobs import Launcher, free_port

from dpgen.distributed.gloo.torch_world import clone_store, open_store
from dpgen.distributed.network import is_local_error

# Three ranks connect four times, as after three losses. Each prints its connections to other ranks at the end.
PROGRAM = """
import os, socket, sys, time
from dpgen.distributed.gloo import torch_world as world

engine_pipe = socket.socketpair()  # another part of the process has connections, too
rank, port = int(sys.argv[1]), int(sys.argv[2])
base = world.open_store(("127.0.0.1", port), num_ranks=3, is_host=rank == 0, connect_s=120, answer_s=120)
for epoch in range(4):
    if epoch:
        world.forget_world()
    world.connect_world(base, world.add_prefix(base, f"epoch-{epoch}"), rank, 3, 120)
    base.add(f"connected/{epoch}", 1)
    while base.add(f"connected/{epoch}", 0) < 3:
        time.sleep(0.05)
deadline_s = time.monotonic() + 180
while (num := len(world._list_connections(base.port))) > 2 and time.monotonic() < deadline_s:
    time.sleep(0.05)
print("connections", num, flush=True)
engine_pipe[0].sendall(b"still open")
for key in ("counted", "left"):  # a rank that exits closes connections that others still count, or the store
    base.add(key, 1)
    while (key == "counted" or rank == 0) and base.add(key, 0) < 3:
        time.sleep(0.05)
os._exit(0)
"""


@pytest.mark.multi
@pytest.mark.slow
def test_a_forgotten_world_leaves_no_connection_open(launcher: Launcher) -> None:
    port = str(free_port())
    jobs = [
        launcher.start([launcher.python, "-c", PROGRAM, str(rank), port], GLOO_SOCKET_IFNAME="lo") for rank in range(3)
    ]
    assert [job.wait() for job in jobs] == [0] * 3, "".join(job.output for job in jobs)
    assert [re.findall(r"connections (\d+)", job.output) for job in jobs] == [["2"]] * 3


STORE_PROGRAM = """
import sys
from dpgen.distributed.gloo import torch_world as world

base = world.open_store(("127.0.0.1", 0), num_ranks=None, is_host=True, connect_s=60, answer_s=60)
print("port", base.port, flush=True)
sys.stdin.read()
"""


def test_another_connection_to_a_stopped_store_is_given_up() -> None:
    """As of a torchrun that is stopped while its ranks join: the kernel connects them, and nobody answers."""
    with subprocess.Popen(
        [sys.executable, "-c", STORE_PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as host:
        try:
            assert host.stdout is not None
            port = int(host.stdout.readline().split()[1])
            store = open_store(("127.0.0.1", port), num_ranks=None, is_host=False, connect_s=60, answer_s=60)
            store.set("key", "value")
            host.send_signal(signal.SIGSTOP)
            with pytest.raises(RuntimeError, match="no answer within 1 s"):
                clone_store(store, 1.0)
        finally:
            host.kill()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (f"[../pair.cc:254] accept: {os.strerror(errno.EMFILE)}", True),
        (f"[enforce fail at device.cc:83] rv != -1. bind: {os.strerror(errno.EADDRNOTAVAIL)}", True),
        (f"[../pair.cc:534] Connection closed by peer [198.18.0.2]:4242: {os.strerror(errno.ECONNRESET)}", False),
        ("the store has not answered for 60 s", False),
    ],
)
def test_a_limit_of_this_host_is_told_from_a_lost_peer(message: str, expected: bool) -> None:
    assert is_local_error(RuntimeError(message)) == expected


WAITING_PROGRAM = """
import logging, sys
import dpgen.log
from dpgen.distributed.gloo.torch_world import open_store

dpgen.log._FIRST_NOTICE_S = 0.0
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
try:
    open_store(("127.0.0.1", int(sys.argv[1])), num_ranks=2, is_host=False, connect_s=1, answer_s=1)
except RuntimeError:
    print("no store", flush=True)
"""


def test_a_rank_says_that_it_waits_for_rank_0s_store(launcher: Launcher) -> None:
    port = free_port()
    job = launcher.start([launcher.python, "-c", WAITING_PROGRAM, str(port)])
    assert job.wait() == 0, job.output
    line = f"WARNING waiting for rank 0, whose store does not answer at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT). "
    assert line in job.output, "torch's call must not keep the thread from logging"


SILENT_PROGRAM = """
import sys
from dpgen.distributed.gloo import torch_world

torch_world._SILENCE_S = 1.0
try:
    torch_world.open_store(("127.0.0.1", int(sys.argv[1])), num_ranks=2, is_host=False, connect_s=1, answer_s=1)
except RuntimeError as error:
    print(error, flush=True)
"""


def test_a_store_whose_process_is_stopped_is_given_up(launcher: Launcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stopped:  # the kernel accepts for it, and nobody answers
        job = launcher.start([launcher.python, "-c", SILENT_PROGRAM, str(stopped.getsockname()[1])])
        assert job.wait() == 0, job.output
    assert "no answer within 2 s, as from a process that is stopped" in job.output
