"""Whether NVIDIA's Multi-Process Service is there for the engines of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dpgen.engine.pool.mps import find_mps


def start_daemon(directory: Path, pid: int | str) -> dict[str, str]:
    (directory / "control").touch()
    (directory / "nvidia-cuda-mps-control.pid").write_text(str(pid))
    return {"CUDA_MPS_PIPE_DIRECTORY": str(directory)}


def test_a_daemon_that_runs_is_found_where_the_environment_names_it(tmp_path: Path) -> None:
    assert find_mps({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}) is None
    assert find_mps(start_daemon(tmp_path, os.getpid())) == tmp_path
    assert find_mps(start_daemon(tmp_path, "")) == tmp_path, "versions without the file"


def test_the_files_of_a_daemon_that_was_killed_count_for_nothing(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert find_mps(start_daemon(tmp_path, ended.pid)) is None
