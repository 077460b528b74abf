"""Whether NVIDIA's Multi-Process Service is there for the engines of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpgen.config.loader import load
from dpgen.engine.pool.engine_count import EngineCount
from dpgen.engine.pool.mps import find_mps
from dpgen.journal.run_dir import RunDir
from dpgen.run_parts import connect_engines


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


@pytest.mark.parametrize(
    ("number", "share_devices", "is_said"), [(2, "false", True), (1, "true", True), (1, "false", False)]
)
def test_the_line_on_engines_says_that_those_of_one_gpu_use_mps(
    number: int,
    share_devices: str,
    is_said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    words = ["model=m", "data.path=d.jsonl", "data.prompt_column=p", f"parallel.share_devices={share_devices}"]
    config = load([], [f"run.dir={tmp_path}/run", *words])
    engine, group, run_dir = (
        SimpleNamespace(growth=SimpleNamespace()),
        SimpleNamespace(rank=0, size=1),
        RunDir(config.run.dir),
    )
    monkeypatch.setattr(run_dir, "update_metadata", lambda **facts: None)
    of_a_rank: Any = (config, engine, group, run_dir, lambda: 0)
    connect_engines(*of_a_rank)
    with caplog.at_level("INFO", "dpgen"):
        engine.growth.on_decided(EngineCount(number, "why"))
    [line] = caplog.messages
    assert ("NVIDIA MPS runs" in line) == is_said


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's directory needs root")
def test_a_daemon_that_is_closed_to_this_user_counts_for_nothing(tmp_path: Path) -> None:
    environ = start_daemon(tmp_path, os.getpid())
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        assert find_mps(environ) is None
    finally:
        os.seteuid(0)
