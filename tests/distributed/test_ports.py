"""Ports that the sbatch script finds for torchrun."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from dpgen.distributed.ports import bind_first_free, derive_job_ports, main
from dpgen.errors import DpgenError

JOB = 4711


def test_the_command_prints_a_port_of_the_job_that_is_free_here() -> None:
    with bind_first_free(derive_job_ports(JOB, 0)) as listener:
        taken = listener.getsockname()[1]
        printed = subprocess.run(
            [sys.executable, "-m", "dpgen.ports", str(JOB), "0"], capture_output=True, text=True, check=True
        )
    free = int(printed.stdout)
    assert free != taken and free in derive_job_ports(JOB, 0)


def test_if_no_port_is_free_the_error_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as listeners:
        for port in derive_job_ports(JOB, 1):
            with contextlib.suppress(DpgenError):  # another process listens on this port
                listeners.enter_context(bind_first_free([port]))
        assert main([str(JOB), "1"]) == 1
    assert "set MASTER_PORT" in capsys.readouterr().err
