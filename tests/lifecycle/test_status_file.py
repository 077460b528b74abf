"""The file that says how a run has ended, where a launcher's exit status can't."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.jobs import SHORT_LEASE, Launcher, make_numbered_rows, wait_for

from dpgen.errors import DpgenError, Interrupted
from dpgen.lifecycle.shutdown import ShutdownMonitor
from dpgen.lifecycle.status_file import STATUS_FILE, StatusFile

WriteConfig = Callable[..., str]
SLOW = {"step_s": 0.05, "max_num_seqs": 4}


def told(tmp_path: Path) -> list[str]:
    """The words of the file; none if it isn't there."""
    path = tmp_path / "status"
    return path.read_text().split() if path.exists() else []


def status_file(tmp_path: Path) -> dict[str, str]:
    return {STATUS_FILE: str(tmp_path / "status")}


def test_a_signal_stops_a_run_but_no_complete_one() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        running, complete = ShutdownMonitor(), ShutdownMonitor()
        running.install_handlers()
        with pytest.raises(Interrupted, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        complete.install_handlers()
        complete.ignore_signals()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert complete.reason is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_rank_0_has_the_last_word(tmp_path: Path) -> None:
    first, other = (StatusFile(status_file(tmp_path)) for _ in range(2))
    first.reset(is_rank_0=True)
    other.reset(is_rank_0=False)
    other.write(0)
    assert told(tmp_path) == []
    first.num_done = 7
    other.write_once(75)
    assert told(tmp_path) == ["75", "?"]
    first.write(0)
    other.write_once(75)
    assert told(tmp_path) == ["0", "7"]
    StatusFile(status_file(tmp_path)).reset(is_rank_0=True)
    assert told(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DpgenError, match=r"DPGEN_STATUS_FILE=.*nowhere/status can't be written: No such file"):
        StatusFile({STATUS_FILE: str(tmp_path / "nowhere" / "status")}).reset(is_rank_0=True)


def test_nobody_asked(tmp_path: Path) -> None:
    ending = StatusFile({})
    ending.reset(is_rank_0=True)
    ending.write(0)
    ending.write_once(0)
    assert not list(tmp_path.iterdir())


def test_complete_and_wrongly_configured_runs(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(10))
    assert launcher.dpgen("run", conf, **status_file(tmp_path)).wait() == 0
    assert told(tmp_path) == ["0", "10"]
    assert launcher.dpgen("run", conf, "engine.nonsense=1", **status_file(tmp_path)).wait() == 2
    assert told(tmp_path)[0] == "2"


def test_a_rank_that_fails_before_the_ranks_have_met_says_so(tmp_path: Path) -> None:
    failing, stopped = (StatusFile(status_file(tmp_path)) for _ in range(2))
    failing.write(1)
    stopped.write_once(75)  # by a launcher that ends the others
    assert told(tmp_path) == ["1", "?"]


@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_is_stopped_while_it_joins_is_resumable(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, number: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        environment = {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": "2",
        }
        environment |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])}
        command = [launcher.python, "-m", "dpgen", "run", write_config(make_numbered_rows(3))]
        job = launcher.start(command, **environment, **status_file(tmp_path))
        connection, _ = silent.accept()
        with connection:  # it waits for an answer now, in a call that no Python handler interrupts
            job.process.send_signal(number)
            assert job.wait(30) == 75, job.output
    assert told(tmp_path) == ["75", "?"]
    assert f"dpgen: stopped: told to stop by {number.name} before the run had begun" in job.output


@pytest.mark.multi
def test_a_stopped_run_says_how_far_it_came(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(300), engine=SLOW)
    job = launcher.dpgen("run", conf, "run.time_limit=5", ranks=2, **status_file(tmp_path))
    assert job.wait() == 1, "which is torchrun's"
    status, num_done = told(tmp_path)
    assert status == "75" and 0 < int(num_done) < 300


@pytest.mark.multi
def test_ranks_that_torchrun_stops_for_anothers_failure_do_not_make_it_resumable(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(30), engine={"load_error": "no such model"})
    assert launcher.dpgen("run", conf, ranks=2, **status_file(tmp_path)).wait() == 1
    assert told(tmp_path)[0] == "1"


@pytest.mark.multi
def test_a_run_that_lost_rank_0_is_resumable(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(200), engine=SLOW)
    jobs = launcher.start_like_srun("run", conf, each=[[], [], []], **status_file(tmp_path))
    wait_for(lambda: "KV cache" in jobs[0].output)
    os.kill(jobs[0].process.pid, signal.SIGKILL)
    assert [job.wait(60) for job in jobs] == [-signal.SIGKILL, 75, 75]
    assert told(tmp_path)[0] == "75"


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_that_went_on_without_a_rank_is_complete(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(100), engine=SLOW)
    jobs = launcher.start_like_srun("run", conf, each=[[], [], []], **SHORT_LEASE, **status_file(tmp_path))
    wait_for(lambda: "KV cache" in jobs[0].output)
    os.kill(jobs[2].process.pid, signal.SIGKILL)
    assert [job.wait(120) for job in jobs] == [0, 0, -signal.SIGKILL]
    assert told(tmp_path)[0] == "0"
