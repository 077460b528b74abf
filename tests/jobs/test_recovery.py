"""What dies, and when: engines, ranks, launchers; and being told to stop. No row is lost, doubled, or given up."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import SHORT_LEASE, Launcher, find_engine_pids, free_port, load_result, make_numbered_rows, wait_for

pytestmark = pytest.mark.multi

WriteConfig = Callable[..., str]


def journaled(run_dir: Path) -> int:
    """Bytes of results that have reached the disk so far."""
    return sum(path.stat().st_size for path in run_dir.glob("journal/*.journal"))


def results(tmp_path: Path, count: int) -> list[dict[str, Any]]:
    found = load_result(tmp_path / "run")
    assert [row["row_id"] for row in found] == list(range(count))
    return found


def undisturbed(launcher: Launcher, conf: str, tmp_path: Path) -> list[dict[str, Any]]:
    job = launcher.dpgen("run", conf, f"run.dir={tmp_path / 'undisturbed' / 'run'}", "engine.step_s=0")
    assert job.wait() == 0, job.output
    return load_result(tmp_path / "undisturbed" / "run")


# ---- engines


@pytest.mark.slow
def test_a_killed_engine_is_replaced_and_nobody_else_notices(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(120), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2)
    wait_for(lambda: journaled(tmp_path / "run") > 1000)
    os.kill(find_engine_pids(job)[0], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert job.output.count("the engine process was ended by SIGKILL; starting it again") == 1, job.output
    assert results(tmp_path, 120) == undisturbed(launcher, conf, tmp_path)


@pytest.mark.slow
def test_a_hung_engine_is_replaced(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(60), run={"engine_timeout_s": 3}, engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf)
    wait_for(lambda: journaled(tmp_path / "run") > 500)
    os.kill(find_engine_pids(job)[0], signal.SIGSTOP)
    assert job.wait() == 0, job.output
    assert re.search(r"the engine said nothing for \d s while it had work", job.output), job.output
    results(tmp_path, 60)


@pytest.mark.slow
def test_a_row_that_kills_its_engine_is_recorded_and_the_run_goes_on(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        make_numbered_rows(40), engine={"crash_on": "number 17", "max_num_seqs": 4}, work={"reserve_rows": 2}
    )
    job = launcher.dpgen("run", conf, ranks=2)
    assert job.wait() == 0, job.output
    errors = {row["row_id"]: row["error"] for row in results(tmp_path, 40) if row["error"]}
    assert list(errors) == [17]
    assert errors[17]["type"] == "poison_row" and "SIGKILL" in errors[17]["message"]


@pytest.mark.parametrize("steal", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_an_engine_that_does_not_come_back_leaves_its_rows_to_the_others(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, steal: str
) -> None:
    conf = write_config(make_numbered_rows(60), run={"max_engine_deaths": 1})
    jobs = launcher.start_like_srun(
        "run", conf, f"work.steal={steal}", each=[["engine.step_s=0.01"], ["engine.crash_on=row"]]
    )
    assert [job.wait() for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    assert "given up after 1 death in a row" in jobs[1].output
    assert all(row["error"] is None for row in results(tmp_path, 60))


def test_only_when_no_engine_is_left_does_the_run_fail_and_it_can_go_on(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(30), run={"max_engine_deaths": 1})
    jobs = launcher.start_like_srun("run", conf, "engine.crash_on=row", each=[[], []])
    assert [job.wait(60) for job in jobs] == [75, 75]
    assert sum(job.output.count("every engine was given up") for job in jobs) == 1
    assert launcher.dpgen("run", conf).wait() == 0
    assert all(row["error"] is None for row in results(tmp_path, 30))


# ---- ranks


@pytest.mark.slow
def test_ranks_under_srun_go_on_without_one_that_was_killed(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, each=[[], [], []], **SHORT_LEASE)
    wait_for(lambda: journaled(tmp_path / "run") > 3000)
    os.kill(jobs[1].process.pid, signal.SIGKILL)
    assert [job.wait(120) for job in jobs] == [0, -signal.SIGKILL, 0], "".join(job.output for job in jobs)
    assert "going on without it" in jobs[0].output
    wait_for(lambda: not find_engine_pids(jobs[1]))
    assert results(tmp_path, 200) == undisturbed(launcher, conf, tmp_path)


@pytest.mark.slow
def test_ranks_under_srun_go_on_without_two_that_die_one_after_the_other(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, each=[[], [], [], []], **SHORT_LEASE)
    wait_for(lambda: journaled(tmp_path / "run") > 3000)
    os.kill(jobs[3].process.pid, signal.SIGKILL)
    wait_for(lambda: "going on without it" in jobs[2].output)
    os.kill(jobs[2].process.pid, signal.SIGKILL)
    assert [job.wait(200) for job in jobs[:2]] == [0, 0], "".join(job.output for job in jobs)
    results(tmp_path, 300)


@pytest.mark.slow
def test_ranks_under_srun_go_on_without_one_that_hangs(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, each=[[], [], []])
    wait_for(lambda: journaled(tmp_path / "run") > 3000)
    os.kill(jobs[2].process.pid, signal.SIGSTOP)
    assert [job.wait(200) for job in jobs[:2]] == [0, 0], "".join(job.output for job in jobs)
    assert "rank 2 has not been heard of for 60 s" in "".join(job.output for job in jobs)
    os.kill(jobs[2].process.pid, signal.SIGCONT)
    assert jobs[2].wait(60) != 0, "a zombie does not claim success"
    results(tmp_path, 200)


@pytest.mark.slow
def test_losing_the_stores_host_leaves_a_run_that_can_go_on(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, each=[[], [], []])
    wait_for(lambda: journaled(tmp_path / "run") > 3000)
    os.kill(jobs[0].process.pid, signal.SIGKILL)
    assert [job.wait(60) for job in jobs] == [-signal.SIGKILL, 75, 75]
    again = launcher.dpgen("run", conf, "engine.step_s=0", ranks=2)
    assert again.wait() == 0, again.output
    assert re.search(r"attempt 2: [1-9]\d* of 200 rows are done", again.output)
    results(tmp_path, 200)


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank_and_the_run_goes_on(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(120), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2, torchrun=["--max-restarts", "2"])
    wait_for(lambda: journaled(tmp_path / "run") > 1000)
    os.kill(ranks_of(job.process.pid)[1], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert re.search(r"attempt 2: [1-9]\d* of 120 rows are done", job.output), job.output
    results(tmp_path, 120)


def test_ranks_that_lose_the_stores_host_while_they_claim_rows_end_resumable(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), engine={"step_s": 0.001}, work={"claim_rows": 1, "reserve_rows": 0})
    jobs = launcher.start_like_srun("run", conf, each=[[], [], []])
    wait_for(lambda: journaled(tmp_path / "run") > 3000)
    os.kill(jobs[0].process.pid, signal.SIGKILL)
    assert [job.wait(60) for job in jobs] == [-signal.SIGKILL, 75, 75], "".join(job.output for job in jobs)
    assert "Traceback" not in "".join(job.output for job in jobs)


@pytest.mark.slow
def test_ranks_meet_again_where_only_one_of_two_torchruns_counts_the_restart(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(120), engine={"step_s": 0.02, "max_num_seqs": 4})
    # One agent a "node". The second's worker is stopped, so its agent sees others waiting, not a worker that failed.
    rendezvous = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    options = [*rendezvous, "--nproc-per-node", "1", "--max-restarts", "2", "--shutdown-timeout", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "dpgen", "run", conf]
    jobs = [launcher.start(command), launcher.start(command)]
    wait_for(lambda: journaled(tmp_path / "run") > 1000)
    [stopped] = ranks_of(jobs[1].process.pid)
    os.kill(stopped, signal.SIGSTOP)
    os.kill(ranks_of(jobs[0].process.pid)[0], signal.SIGKILL)
    wait_for(lambda: "closing signal SIGTERM" in jobs[1].output)
    os.kill(stopped, signal.SIGCONT)
    assert [job.wait(120) for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    assert re.search(r"attempt 2: [1-9]\d* of 120 rows are done", "".join(job.output for job in jobs))
    results(tmp_path, 120)


def ranks_of(launcher_pid: int) -> list[int]:
    """Ids of the rank processes below a launcher."""
    children = Path(f"/proc/{launcher_pid}/task/{launcher_pid}/children").read_text().split()
    return sorted(int(pid) for pid in children if b"dpgen" in Path(f"/proc/{pid}/cmdline").read_bytes())


# ---- resuming


@pytest.mark.slow
def test_an_unfinished_run_goes_on_where_it_stopped_at_any_world_size(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(150), engine={"step_s": 0.02, "max_num_seqs": 4})
    done = 0
    for ranks in (2, 1, 3):
        job = launcher.dpgen("run", conf, ranks=ranks)
        before = journaled(tmp_path / "run")
        wait_for(lambda before=before: journaled(tmp_path / "run") > before + 1500)
        job.end()
        told = re.search(r"attempt \d: (\d+) of 150 rows are done", job.output)
        assert told is None or int(told[1]) > done
        done = int(told[1]) if told else done
    job = launcher.dpgen("run", conf, "engine.step_s=0")
    assert job.wait() == 0, job.output
    assert results(tmp_path, 150) == undisturbed(launcher, conf, tmp_path)


def test_resume_never_wants_an_empty_folder(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(5))
    (tmp_path / "run").mkdir()
    first = launcher.dpgen("run", conf, "run.resume=never")
    assert first.wait() == 0, first.output
    marker = (tmp_path / "run" / "_SUCCESS").stat().st_mtime_ns
    for other in ([], ["sampling.max_tokens=3"]):
        again = launcher.dpgen("run", conf, "run.resume=never", *other)
        assert again.wait() == 2, "also where the same run is finished there"
        assert "is not empty" in again.output
    assert (tmp_path / "run" / "_SUCCESS").stat().st_mtime_ns == marker


def test_resume_force_goes_on_with_other_settings_and_keeps_what_is_done(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(60), engine={"step_s": 0.02, "max_num_seqs": 4}, sampling={"max_tokens": 5})
    job = launcher.dpgen("run", conf)
    wait_for(lambda: journaled(tmp_path / "run") > 500)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    refused = launcher.dpgen("run", conf, "sampling.max_tokens=3")
    assert refused.wait() == 2
    assert "sampling.max_tokens: 5 → 3" in refused.output and "run.resume=force" in refused.output
    forced = launcher.dpgen("run", conf, "sampling.max_tokens=3", "run.resume=force")
    assert forced.wait() == 0, forced.output
    told = re.search(r"attempt 2: (\d+) of 60 rows are done, (\d+) to go", forced.output)
    assert told, forced.output
    lengths = [row["num_generated_tokens"] for row in results(tmp_path, 60)]
    assert sorted(set(lengths)) == [3, 5]
    assert [lengths.count(5), lengths.count(3)] == [int(told[1]), int(told[2])], "done rows stay as they were"
    assert "finished result already" in launcher_output(launcher, conf, "sampling.max_tokens=3"), (
        "it is a run of the new settings now"
    )


def test_resume_force_does_not_mix_two_inputs(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    assert launcher.dpgen("run", write_config(make_numbered_rows(5))).wait() == 0
    job = launcher.dpgen("run", write_config(make_numbered_rows(6)), "run.resume=force")
    assert job.wait() == 2, job.output
    assert "results of another input" in job.output
    assert len(results(tmp_path, 5)) == 5


@pytest.mark.parametrize(("retry", "left"), [("true", []), ("[poison_row]", [2]), ("[bad_sampling]", [7])])
def test_failed_rows_can_be_tried_again_all_or_by_type(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, retry: str, left: list[int]
) -> None:
    rows = [{"prompt": f"row number {index}", "budget": 3} for index in range(10)]
    conf = write_config(rows, sampling={"from_columns": {"max_tokens": "budget"}})
    job = launcher.dpgen("run", conf, "engine.raise_on=number 7", "engine.refuse_on=number 2")
    assert job.wait() == 0, job.output
    assert {row["row_id"]: row["error"]["type"] for row in results(tmp_path, 10) if row["error"]} == {
        2: "bad_sampling",
        7: "poison_row",
    }
    assert "finished result already" in launcher_output(launcher, conf)
    again = launcher.dpgen("run", conf, f"run.retry_errors={retry}")
    assert again.wait() == 0, again.output
    assert [row["row_id"] for row in results(tmp_path, 10) if row["error"]] == left


def launcher_output(launcher: Launcher, *arguments: str) -> str:
    job = launcher.dpgen("run", *arguments)
    assert job.wait() == 0, job.output
    return job.output


# ---- being told to stop


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_signal_stops_it_well_within_five_seconds(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, number: signal.Signals
) -> None:
    conf = write_config(make_numbered_rows(300), engine={"step_s": 0.02, "max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, each=[[], []])
    wait_for(lambda: journaled(tmp_path / "run") > 1000)
    told_s = time.monotonic()
    for job in jobs:
        job.process.send_signal(number)
    assert [job.wait(10) for job in jobs] == [75, 75]
    assert time.monotonic() - told_s < 5
    output = "".join(job.output for job in jobs)
    assert output.count(f"told to stop by {number.name}; the same command goes on from here") == 1, output
    assert "Traceback" not in output
    again = launcher.dpgen("run", conf, "engine.step_s=0")
    assert again.wait() == 0
    results(tmp_path, 300)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_an_engine_leaves_signals_that_go_to_a_whole_job_to_its_rank(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, number: signal.Signals
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(60), engine={"step_s": 0.02, "max_num_seqs": 4}))
    wait_for(lambda: journaled(tmp_path / "run") > 500)
    os.kill(find_engine_pids(job)[0], number)
    assert job.wait() == 0, job.output
    assert "starting it again" not in job.output


def test_a_stop_during_start_up_is_as_quick(launcher: Launcher, write_config: WriteConfig) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(30)), "engine.load_s=60")
    wait_for(lambda: "30 rows over 1 rank" in job.output)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(5) == 75
    wait_for(lambda: not find_engine_pids(job))


def test_a_time_limit_stops_it(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(300), engine={"step_s": 0.05, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, "run.time_limit=4")
    assert job.wait(60) == 75
    assert "run.time_limit=4 is near" in job.output
    assert journaled(tmp_path / "run") > 100


def test_slurms_end_time_stops_it(launcher: Launcher, write_config: WriteConfig) -> None:
    conf = write_config(make_numbered_rows(300), run={"stop_margin_s": 60}, engine={"step_s": 0.05})
    [job] = launcher.start_like_srun("run", conf, each=[[]], SLURM_JOB_END_TIME=str(int(time.time()) + 62))
    assert job.wait(60) == 75
    assert "SLURM's time limit is near" in job.output


def test_a_second_live_run_on_the_folder_is_refused(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), engine={"step_s": 0.05})
    first = launcher.dpgen("run", conf)
    wait_for(lambda: journaled(tmp_path / "run") > 100)
    second = launcher.start_like_srun("run", conf, each=[[], []])
    assert [job.wait(60) for job in second] == [2, 2]
    assert "".join(job.output for job in second).count("another run is at work") == 1
    first.end()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["attempt"] == 1


@pytest.mark.slow
def test_an_engine_killed_while_it_starts_is_started_again(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(30)), "engine.load_s=3", ranks=2)
    wait_for(lambda: "30 rows over 2 ranks" in job.output and len(find_engine_pids(job)) == 2)
    os.kill(find_engine_pids(job)[1], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert job.output.count("while it was starting; starting it again") == 1
    results(tmp_path, 30)


@pytest.mark.parametrize("moment", [pytest.param("", marks=pytest.mark.slow), "KV cache"])
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
        assert time.monotonic() < deadline_s, f"of {left} {alive} still run a minute after torchrun was killed"
        time.sleep(0.05)
