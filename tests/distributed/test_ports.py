"""Ports that a SLURM job's script finds for torchrun."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from dpgen.distributed.ports import bind_first_free, derive_job_ports, main
from dpgen.errors import DpgenError

JOB = 4711


def test_it_is_the_first_port_of_the_job_that_is_free_here() -> None:
    with bind_first_free(derive_job_ports(JOB, 0)) as stranger:
        taken = stranger.getsockname()[1]
        printed = subprocess.run(
            [sys.executable, "-m", "dpgen.ports", str(JOB), "0"], capture_output=True, text=True, check=True
        )
    free = int(printed.stdout)
    assert free != taken and free in derive_job_ports(JOB, 0)


def test_where_none_is_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.ExitStack() as strangers:
        for port in derive_job_ports(JOB, 1):
            with contextlib.suppress(DpgenError):  # it is somebody's already
                strangers.enter_context(bind_first_free([port]))
        assert main([str(JOB), "1"]) == 1
    assert "set MASTER_PORT" in capsys.readouterr().err
