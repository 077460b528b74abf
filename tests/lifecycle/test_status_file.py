"""Writing how a run ended to a file, since a launcher's exit status can't tell."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from helpers.jobs import SHORT_LEASE, Launcher, WriteConfig, free_port, make_numbered_rows, wait_for
from helpers.proxy import Proxy

from dpgen.errors import DpgenError
from dpgen.lifecycle.requeue import AttemptStatus
from dpgen.lifecycle.requeue import read_status as read_attempt
from dpgen.lifecycle.status_file import STATUS_FILE, StatusFile

SLOW = {"step_s": 0.05, "max_num_seqs": 4}


def read_status(tmp_path: Path) -> list[str]:
    """Return the words of the file; none if there is no file."""
    path = tmp_path / "status"
    return path.read_text().split() if path.exists() else []


def status_variable(tmp_path: Path) -> dict[str, str]:
    return {STATUS_FILE: str(tmp_path / "status")}


def test_only_the_status_of_rank_0_is_final(tmp_path: Path) -> None:
    rank_0, other = (StatusFile(status_variable(tmp_path)) for _ in range(2))
    rank_0.reset(0)
    other.reset(1)
    other.write(0)
    assert not list(tmp_path.iterdir())
    other.num_done = 3
    other.write_once(75)
    assert read_status(tmp_path) == [], "the sbatch script ends the job soon after this file appears"
    assert read_attempt(tmp_path) == AttemptStatus(75, 3), "rank 0 is dead if the step ends without its status"
    rank_0.num_done = 7
    rank_0.write(0)
    other.write_once(75)
    assert read_status(tmp_path) == ["0", "7"]
    assert read_attempt(tmp_path) == AttemptStatus(0, 7)
    StatusFile(status_variable(tmp_path)).reset(0)
    assert not list(tmp_path.iterdir()), "a new attempt removes the statuses of an earlier one"


def test_the_ranks_that_lost_rank_0_agree_on_the_worst_status_and_the_most_rows(tmp_path: Path) -> None:
    for rank, (status, num_done) in enumerate([(75, None), (75, 30), (75, 20)], start=1):
        status_file = StatusFile(status_variable(tmp_path))
        status_file.reset(rank)
        status_file.num_done = num_done
        status_file.write_once(status)
    assert read_attempt(tmp_path) == AttemptStatus(75, 30)
    (tmp_path / "status.rank-9").write_text("1 25\n")
    assert read_attempt(tmp_path) == AttemptStatus(1, 30), "a run that failed is not requeued"


def test_a_path_that_cannot_be_written_is_rejected_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DpgenError, match=r"DPGEN_STATUS_FILE=.*nowhere/status can't be written: No such file"):
        StatusFile({STATUS_FILE: str(tmp_path / "nowhere" / "status")}).reset(0)


def test_without_the_variable_no_file_is_written(tmp_path: Path) -> None:
    status_file = StatusFile({})
    status_file.reset(0)
    status_file.write(0)
    status_file.write_once(0)
    assert not list(tmp_path.iterdir())


def test_a_complete_run_and_a_wrong_configuration_write_their_status(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(10))
    assert launcher.dpgen("run", conf, **status_variable(tmp_path)).wait() == 0
    assert read_status(tmp_path) == ["0", "10"]
    assert launcher.dpgen("run", conf, "engine.nonsense=1", **status_variable(tmp_path)).wait() == 2
    assert read_status(tmp_path)[0] == "2"


def test_a_rank_that_fails_before_the_ranks_have_joined_writes_its_status(tmp_path: Path) -> None:
    failing, stopped = (StatusFile(status_variable(tmp_path)) for _ in range(2))
    failing.write(1)
    stopped.write_once(75)  # the launcher ends the other ranks
    assert read_status(tmp_path) == ["1", "?"]


@pytest.mark.multi
@pytest.mark.parametrize(("number", "log_format"), [(signal.SIGTERM, "text"), (signal.SIGUSR1, "json")])
def test_a_rank_that_is_stopped_while_it_joins_is_resumable(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, number: signal.Signals, log_format: str
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
        conf = write_config(make_numbered_rows(3), run={"log_format": log_format})
        command = [launcher.python, "-m", "dpgen", "run", conf]
        job = launcher.start(command, **environment, **status_variable(tmp_path))
        connection, _ = silent.accept()
        with connection:  # the rank now waits for an answer in a call that no Python handler interrupts
            job.process.send_signal(number)
            assert job.wait(30) == 75, job.output
    assert read_status(tmp_path) == ["75", "?"]
    reason = f"interrupted by {number.name} before the run started. Rerun the same command to resume"
    if log_format == "json":
        assert [json.loads(line)["message"] for line in job.output.splitlines()][-1] == reason, job.output
    else:
        assert f"dpgen: stopped: {reason}\n" in job.output


@pytest.mark.slow
@pytest.mark.multi
def test_a_stopped_run_writes_the_number_of_done_rows(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(600), engine=SLOW)
    # The limit counts from the start of the run, and on a busy machine loading alone takes more than 5 s.
    job = launcher.dpgen("run", conf, "run.time_limit=15", ranks=2, **status_variable(tmp_path))
    assert job.wait() == 1, "torchrun exits with 1 whatever its workers exit with"
    status, num_done = read_status(tmp_path)
    assert status == "75" and 0 < int(num_done) < 600


@pytest.mark.slow
@pytest.mark.multi
def test_a_failed_run_stays_failed_though_torchrun_stops_its_other_ranks(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(30), engine={"load_error": "no such model"})
    assert launcher.dpgen("run", conf, ranks=2, **status_variable(tmp_path)).wait() == 1
    assert read_status(tmp_path)[0] == "1"


@pytest.mark.slow
@pytest.mark.multi
def test_a_run_that_lost_rank_0_is_resumable(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(200), engine=SLOW)
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], [], []], **status_variable(tmp_path))
    wait_for(lambda: "KV cache" in jobs[0].output)
    os.kill(jobs[0].process.pid, signal.SIGKILL)
    assert [job.wait(60) for job in jobs] == [-signal.SIGKILL, 75, 75]
    status = read_attempt(tmp_path)
    assert status is not None and status.exit_status == 75


@pytest.mark.multi
@pytest.mark.slow
def test_a_rank_that_alone_is_cut_off_from_rank_0_writes_no_status_of_the_run(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine=SLOW)
    port = free_port()
    with Proxy(port) as proxy:
        environment = {**SHORT_LEASE, **status_variable(tmp_path), "MASTER_ADDR": "127.0.0.1"}
        jobs = launcher.start_like_srun(
            "run",
            conf,
            rank_arguments=[[], [], []],
            rank_environments={1: {"MASTER_PORT": str(proxy.port)}},
            MASTER_PORT=str(port),
            **environment,
        )
        wait_for(lambda: any(path.stat().st_size > 1000 for path in tmp_path.glob("run/journal/*-rank-00001-*")))
        proxy.cut()  # rank 1 has journaled rows by now, which count as done though it does not report them any more
        assert jobs[1].wait(120) == 75, jobs[1].output
        assert "lost rank 0, which keeps the store" in jobs[1].output
        assert (tmp_path / "status.rank-1").read_text().split()[0] == "75"
        assert read_status(tmp_path) == [], "ranks 0 and 2 run on"
    assert [jobs[0].wait(), jobs[2].wait()] == [0, 0], jobs[0].output
    assert read_attempt(tmp_path) == AttemptStatus(0, 200)


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_that_continued_without_a_lost_rank_is_complete(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(100), engine=SLOW)
    jobs = launcher.start_like_srun(
        "run", conf, rank_arguments=[[], [], []], **SHORT_LEASE, **status_variable(tmp_path)
    )
    wait_for(lambda: "KV cache" in jobs[0].output)
    os.kill(jobs[2].process.pid, signal.SIGKILL)
    assert [job.wait(120) for job in jobs] == [0, 0, -signal.SIGKILL]
    assert read_status(tmp_path)[0] == "0"
