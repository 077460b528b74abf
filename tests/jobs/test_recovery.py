"""Deaths of engines, ranks and launchers, and interruptions. No row is lost, duplicated, or abandoned."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.jobs import SHORT_LEASE, Launcher, WriteConfig, find_engine_pids, free_port, make_numbered_rows, wait_for
from helpers.results import count_journal_bytes, load_all_rows, run_undisturbed

from dpgen.lifecycle.status_file import STATUS_FILE

pytestmark = pytest.mark.multi


# ---- engines


@pytest.mark.slow
def test_a_killed_engine_is_restarted_and_no_other_rank_is_affected(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(120), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 1000)
    os.kill(find_engine_pids(job)[0], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert job.output.count("the engine process was killed by SIGKILL, restarting it") == 1, job.output
    assert load_all_rows(tmp_path / "run", 120) == run_undisturbed(launcher, conf, tmp_path / "undisturbed" / "run")


@pytest.mark.slow
def test_a_hung_engine_is_restarted(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(60), run={"engine_timeout_s": 3}, engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 500)
    os.kill(find_engine_pids(job)[0], signal.SIGSTOP)
    assert job.wait() == 0, job.output
    assert re.search(r"the engine sent no message for \d s while it had work", job.output), job.output
    load_all_rows(tmp_path / "run", 60)


@pytest.mark.slow
def test_a_row_that_kills_its_engine_is_recorded_and_the_run_continues(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        make_numbered_rows(40), engine={"crash_on": "number 17", "max_num_seqs": 4}, work={"reserve_rows": 2}
    )
    job = launcher.dpgen("run", conf, ranks=2)
    assert job.wait() == 0, job.output
    errors = {row["row_id"]: row["error"] for row in load_all_rows(tmp_path / "run", 40) if row["error"]}
    assert list(errors) == [17]
    assert errors[17]["type"] == "poison_row" and "SIGKILL" in errors[17]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("steal", ["true", "false"])
def test_the_other_ranks_generate_the_rows_of_an_abandoned_engine(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, steal: str
) -> None:
    conf = write_config(make_numbered_rows(60), run={"max_engine_deaths": 1})
    jobs = launcher.start_like_srun(
        "run", conf, f"work.steal={steal}", rank_arguments=[["engine.step_s=0.01"], ["engine.crash_on=row"]]
    )
    assert [job.wait() for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    assert "abandoning it after 1 death in a row" in jobs[1].output
    assert all(row["error"] is None for row in load_all_rows(tmp_path / "run", 60))


@pytest.mark.slow
def test_without_any_engine_left_the_run_stops_and_can_be_resumed(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(30), run={"max_engine_deaths": 1})
    jobs = launcher.start_like_srun("run", conf, "engine.crash_on=row", rank_arguments=[[], []])
    assert [job.wait(60) for job in jobs] == [75, 75]
    assert sum(job.output.count("no rank has a working engine left") for job in jobs) == 1
    assert launcher.dpgen("run", conf).wait() == 0
    assert all(row["error"] is None for row in load_all_rows(tmp_path / "run", 30))


# ---- ranks


@pytest.mark.slow
def test_ranks_under_srun_continue_without_a_killed_rank(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], [], []], **SHORT_LEASE)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 3000)
    os.kill(jobs[1].process.pid, signal.SIGKILL)
    assert [job.wait(120) for job in jobs] == [0, -signal.SIGKILL, 0], "".join(job.output for job in jobs)
    assert "continuing with the remaining ranks" in jobs[0].output
    wait_for(lambda: not find_engine_pids(jobs[1]))
    assert load_all_rows(tmp_path / "run", 200) == run_undisturbed(launcher, conf, tmp_path / "undisturbed" / "run")


@pytest.mark.slow
def test_ranks_under_srun_continue_without_two_ranks_killed_one_after_the_other(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], [], [], []], **SHORT_LEASE)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 3000)
    os.kill(jobs[3].process.pid, signal.SIGKILL)
    wait_for(lambda: "continuing with the remaining ranks" in jobs[2].output)
    os.kill(jobs[2].process.pid, signal.SIGKILL)
    assert [job.wait(200) for job in jobs[:2]] == [0, 0], "".join(job.output for job in jobs)
    load_all_rows(tmp_path / "run", 300)


@pytest.mark.slow
def test_ranks_under_srun_continue_without_a_hung_rank(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], [], []])
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 3000)
    os.kill(jobs[2].process.pid, signal.SIGSTOP)
    assert [job.wait(200) for job in jobs[:2]] == [0, 0], "".join(job.output for job in jobs)
    assert "lost rank 2 (no heartbeat for 60 s, last seen generating)" in "".join(job.output for job in jobs)
    os.kill(jobs[2].process.pid, signal.SIGCONT)
    assert jobs[2].wait(60) != 0, "a removed rank does not report success"
    load_all_rows(tmp_path / "run", 200)


@pytest.mark.slow
def test_a_rank_0_whose_main_thread_is_stuck_ends_and_the_other_ranks_with_it(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{{ prompt }}{% if prompt == 'row number 0' %}" + endless + "{% endif %}"
    conf = write_config(
        make_numbered_rows(100),
        data={"prompt_column": None, "template": template, "render_timeout_s": 600},
        work={"steal": False, "order": "dataset"},
    )
    environment = {"DPGEN_LEASE_S": "12", STATUS_FILE: str(tmp_path / "status")}  # stuck after 5 leases
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], []], **environment)
    assert jobs[1].wait(200) == 75, "its store answers, so nothing but rank 0's lease tells"
    assert "rank 0 is stuck (generating): no heartbeat for 12 s" in jobs[1].output, jobs[1].output
    assert jobs[0].wait(120) == 75, "it would hold its job for ever"
    assert "the main thread is stuck" in jobs[0].output, jobs[0].output
    assert (tmp_path / "status").read_text().split()[0] == "75"


@pytest.mark.slow
def test_a_run_that_lost_the_stores_host_can_be_resumed(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], [], []])
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 3000)
    os.kill(jobs[0].process.pid, signal.SIGKILL)
    assert [job.wait(60) for job in jobs] == [-signal.SIGKILL, 75, 75]
    again = launcher.dpgen("run", conf, "engine.step_s=0", ranks=2)
    assert again.wait() == 0, again.output
    assert re.search(r"attempt 2: [1-9]\d* of 200 rows are done", again.output)
    load_all_rows(tmp_path / "run", 200)


@pytest.mark.slow
def test_torchrun_restarts_all_ranks_after_a_killed_one_and_the_run_resumes(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(120), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2, torchrun=["--max-restarts", "2"])
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 1000)
    os.kill(ranks_of(job.process.pid)[1], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert re.search(r"attempt 2: [1-9]\d* of 120 rows are done", job.output), job.output
    load_all_rows(tmp_path / "run", 120)


@pytest.mark.slow
def test_ranks_that_lose_the_stores_host_while_they_claim_rows_end_resumable(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), engine={"step_s": 0.001}, work={"claim_rows": 1, "reserve_rows": 0})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], [], []])
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 3000)
    os.kill(jobs[0].process.pid, signal.SIGKILL)
    assert [job.wait(60) for job in jobs] == [-signal.SIGKILL, 75, 75], "".join(job.output for job in jobs)
    assert "Traceback" not in "".join(job.output for job in jobs)


@pytest.mark.slow
def test_ranks_rendezvous_again_if_only_one_of_two_torchruns_counts_the_restart(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(120), engine={"step_s": 0.02, "max_num_seqs": 4})
    # One agent per "node". The second agent's worker is stopped, so that agent sees the first one waiting, not a worker
    # that failed.
    rendezvous = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    options = [*rendezvous, "--nproc-per-node", "1", "--max-restarts", "2", "--shutdown-timeout", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "dpgen", "run", conf]
    jobs = [launcher.start(command), launcher.start(command)]
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 1000)
    [stopped] = ranks_of(jobs[1].process.pid)
    os.kill(stopped, signal.SIGSTOP)
    os.kill(ranks_of(jobs[0].process.pid)[0], signal.SIGKILL)
    wait_for(lambda: "closing signal SIGTERM" in jobs[1].output)
    os.kill(stopped, signal.SIGCONT)
    assert [job.wait(120) for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    assert re.search(r"attempt 2: [1-9]\d* of 120 rows are done", "".join(job.output for job in jobs))
    load_all_rows(tmp_path / "run", 120)


def ranks_of(launcher_pid: int) -> list[int]:
    """Return the ids of the rank processes below a launcher."""
    children = Path(f"/proc/{launcher_pid}/task/{launcher_pid}/children").read_text().split()
    return sorted(int(pid) for pid in children if b"dpgen" in Path(f"/proc/{pid}/cmdline").read_bytes())


# ---- interruptions


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_stops_a_job_within_five_seconds(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, number: signal.Signals
) -> None:
    conf = write_config(make_numbered_rows(300), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], []])
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 1000)
    signalled_s = time.monotonic()
    for job in jobs:
        job.process.send_signal(number)
    assert [job.wait(10) for job in jobs] == [75, 75]
    assert time.monotonic() - signalled_s < 5
    output = "".join(job.output for job in jobs)
    assert output.count(f"interrupted by {number.name}. Rerun the same command to resume") == 1, output
    assert "Traceback" not in output
    again = launcher.dpgen("run", conf, "engine.step_s=0")
    assert again.wait() == 0
    load_all_rows(tmp_path / "run", 300)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_an_engine_ignores_signals_that_launchers_send_to_a_whole_job(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, number: signal.Signals
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(60), engine={"step_s": 0.02, "max_num_seqs": 4}))
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 500)
    os.kill(find_engine_pids(job)[0], number)
    assert job.wait() == 0, job.output
    assert "restarting it" not in job.output


def test_a_signal_during_start_up_stops_a_job_within_five_seconds(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(30)), "engine.load_s=60")
    wait_for(lambda: "30 rows over 1 rank" in job.output)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(5) == 75
    wait_for(lambda: not find_engine_pids(job))


@pytest.mark.slow
def test_a_time_limit_stops_a_job(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(600), engine={"step_s": 0.05, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, "run.time_limit=15")  # on a busy machine loading alone takes more than 5 s
    assert job.wait(60) == 75
    assert "run.time_limit=15 is near" in job.output
    assert count_journal_bytes(tmp_path / "run") > 100


@pytest.mark.slow
def test_a_time_limit_stops_ranks_that_still_load_their_models(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_config(make_numbered_rows(20), engine={"load_s": 300.0})
    jobs = launcher.start_like_srun("run", conf, "run.time_limit=3", rank_arguments=[[], []])
    assert [job.wait(200) for job in jobs] == [75, 75]
    assert "run.time_limit=3 is near" in jobs[0].output + jobs[1].output


def test_slurms_end_time_stops_a_job(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_config(make_numbered_rows(300), run={"stop_margin_s": 60}, engine={"step_s": 0.05})
    [job] = launcher.start_like_srun("run", conf, rank_arguments=[[]], SLURM_JOB_END_TIME=str(int(time.time()) + 62))
    assert job.wait(60) == 75
    assert "SLURM's time limit is near" in job.output


@pytest.mark.slow
def test_a_second_job_on_the_same_run_directory_is_rejected(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), engine={"step_s": 0.05})
    first = launcher.dpgen("run", conf)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 100)
    second = launcher.start_like_srun("run", conf, rank_arguments=[[], []])
    assert [job.wait(60) for job in second] == [2, 2]
    assert "".join(job.output for job in second).count("in use by another live run") == 1
    first.end()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["attempt"] == 1


@pytest.mark.slow
def test_an_engine_killed_while_it_starts_is_restarted(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(30)), "engine.load_s=3", ranks=2)
    wait_for(lambda: "30 rows over 2 ranks" in job.output and len(find_engine_pids(job)) == 2)
    os.kill(find_engine_pids(job)[1], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert job.output.count("the engine process was killed by SIGKILL, retrying its start-up") == 1
    load_all_rows(tmp_path / "run", 30)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["", "KV cache"])
def test_a_killed_torchrun_leaves_no_process(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, moment: str
) -> None:
    conf = write_config(make_numbered_rows(300), engine={"step_s": 0.05})
    job = launcher.dpgen("run", conf, ranks=2)
    wait_for(lambda: len(ranks_of(job.process.pid)) == 2 and moment in job.output)
    left = [*ranks_of(job.process.pid), *find_engine_pids(job)]
    os.kill(job.process.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 60
    while alive := [pid for pid in left if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline_s, f"{alive} of {left} still run a minute after torchrun was killed"
        time.sleep(0.05)
