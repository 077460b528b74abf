"""Resuming a run: at another world size, with other settings, and with failed rows retried."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers.jobs import Launcher, WriteConfig, descendants, make_numbered_rows, wait_for
from helpers.results import count_journal_bytes, load_all_rows, run_undisturbed

from dpgen.output.verification import verify

pytestmark = pytest.mark.multi


@pytest.mark.slow
def test_an_unfinished_run_resumes_at_any_world_size(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(150), engine={"step_s": 0.02, "max_num_seqs": 4})
    done = 0
    for ranks in (2, 1, 3):
        job = launcher.dpgen("run", conf, ranks=ranks)
        before = count_journal_bytes(tmp_path / "run")
        wait_for(lambda before=before: count_journal_bytes(tmp_path / "run") > before + 1500)
        job.end()
        reported = re.search(r"attempt \d: (\d+) of 150 rows are done", job.output)
        assert reported is None or int(reported[1]) > done
        done = int(reported[1]) if reported else done
    job = launcher.dpgen("run", conf, "engine.step_s=0")
    assert job.wait() == 0, job.output
    assert load_all_rows(tmp_path / "run", 150) == run_undisturbed(launcher, conf, tmp_path / "undisturbed" / "run")


@pytest.mark.slow
def test_a_result_whose_files_were_removed_is_written_again_from_the_journal(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    run, to = tmp_path / "run", tmp_path / "there"
    conf = write_config(make_numbered_rows(7), output={"rows_per_file": 3, "to": str(to)})
    assert launcher.dpgen("run", conf, ranks=2).wait() == 0
    rows, num_bytes = load_all_rows(run, 7), count_journal_bytes(run)
    for ranks, names in ((1, "*"), (2, "train-00001-*")):
        for path in (run / "dataset").glob(names):
            path.unlink()
        again = launcher.dpgen("run", conf, ranks=ranks)
        assert again.wait() == 0, again.output
        assert "writing the finished result again" in again.output and " 0 remain " in again.output
        assert load_all_rows(run, 7) == rows and count_journal_bytes(run) == num_bytes, "no row is generated"
        assert verify(run).verdict == "sound" and len(list(to.glob("*.parquet"))) == 3
    shutil.rmtree(run / "dataset")
    (run / "journal").rename(tmp_path / "elsewhere")
    lost = launcher.dpgen("run", conf)
    assert lost.wait() == 1 and "the journal lacks 7 of 7 rows" in lost.output, "none is generated without a word"


@pytest.mark.slow
def test_resume_never_rejects_a_directory_that_is_not_empty(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(5))
    (tmp_path / "run").mkdir()
    first = launcher.dpgen("run", conf, "run.resume=never")
    assert first.wait() == 0, first.output
    marker = (tmp_path / "run" / "_SUCCESS").stat().st_mtime_ns
    for other in ([], ["sampling.max_tokens=3"]):
        again = launcher.dpgen("run", conf, "run.resume=never", *other)
        assert again.wait() == 2, "even if the same run is finished there"
        assert "is not empty" in again.output
    assert (tmp_path / "run" / "_SUCCESS").stat().st_mtime_ns == marker


@pytest.mark.slow
def test_resume_never_lets_a_requeued_slurm_job_resume_its_own_run(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(100), run={"resume": "never"})

    def run_step(*arguments: str, **environment: str) -> tuple[int, str]:
        [job] = launcher.start_like_srun("run", conf, *arguments, rank_arguments=[[]], **environment)
        return job.wait(), job.output

    slow = ["engine.step_s=0.05", "engine.max_num_seqs=1"]
    [stopped] = launcher.start_like_srun("run", conf, *slow, rank_arguments=[[]], SLURM_JOB_ID="7")
    wait_for(lambda: "KV cache" in stopped.output)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75
    status, output = run_step(SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1")
    assert status == 2 and "is not empty" in output, "another job"
    status, output = run_step(SLURM_JOB_ID="7")
    assert status == 2 and "is not empty" in output, "a second step of the same start"
    status, output = run_step(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert status == 0 and "attempt 2: " in output, output
    status, output = run_step(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    assert status == 0 and "finished result already" in output, output


@pytest.mark.slow
def test_resume_never_lets_torchrun_restart_its_ranks(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(120), run={"resume": "never"}, engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2, torchrun=["--max-restarts", "1"])
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 1000)
    os.kill(descendants(job.process.pid, b"dpgen\0run")[-1], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert re.search(r"attempt 2: [1-9]\d* of 120 rows are done", job.output), job.output
    again = launcher.dpgen("run", conf, ranks=2, torchrun=["--max-restarts", "1"])
    assert again.wait() == 1 and "is not empty" in again.output, (
        "a restart of the refused job is no restart of the first"
    )


@pytest.mark.slow
def test_resume_force_resumes_with_other_settings_and_keeps_done_rows(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(60), engine={"step_s": 0.02, "max_num_seqs": 4}, sampling={"max_tokens": 5})
    job = launcher.dpgen("run", conf)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 500)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    rejected = launcher.dpgen("run", conf, "sampling.max_tokens=3")
    assert rejected.wait() == 2
    assert "sampling.max_tokens: 5 → 3" in rejected.output and "run.resume=force" in rejected.output
    forced = launcher.dpgen("run", conf, "sampling.max_tokens=3", "run.resume=force")
    assert forced.wait() == 0, forced.output
    reported = re.search(r"attempt 2: (\d+) of 60 rows are done, (\d+) remain", forced.output)
    assert reported, forced.output
    [warning] = [line for line in forced.output.splitlines() if "WARNING" in line]
    assert "sampling.max_tokens: 5 → 3" in warning and f"{reported[1]} are done" in warning
    lengths = [row["num_generated_tokens"] for row in load_all_rows(tmp_path / "run", 60)]
    assert sorted(set(lengths)) == [3, 5]
    assert [lengths.count(5), lengths.count(3)] == [int(reported[1]), int(reported[2])], "done rows stay as they were"
    assert "finished result already" in launcher_output(launcher, conf, "sampling.max_tokens=3"), (
        "the run now has the new settings"
    )


def test_resume_force_rejects_another_input(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    assert launcher.dpgen("run", write_config(make_numbered_rows(5))).wait() == 0
    job = launcher.dpgen("run", write_config(make_numbered_rows(6)[::-1]), "run.resume=force")
    assert job.wait() == 2, job.output
    assert "results of another input" in job.output
    assert len(load_all_rows(tmp_path / "run", 5)) == 5


@pytest.mark.slow
def test_a_larger_limit_continues_from_the_rows_of_the_smaller_one(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(40))
    launcher_output(launcher, conf, "data.limit=15")
    output = launcher_output(launcher, conf)
    assert "attempt 2: 15 of 40 rows are done, 25 remain" in output, output
    assert load_all_rows(tmp_path / "run", 40) == run_undisturbed(launcher, conf, tmp_path / "undisturbed" / "run")
    smaller = launcher.dpgen("run", conf, "data.limit=15")
    assert smaller.wait() == 2 and "results of another input" in smaller.output, "the result would lose rows"


def test_a_larger_input_with_other_first_rows_is_another_input(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    launcher_output(launcher, write_config(make_numbered_rows(15)))
    job = launcher.dpgen("run", write_config([{"prompt": "new"}, *make_numbered_rows(15)]), "run.resume=force")
    assert job.wait() == 2 and "results of another input" in job.output, job.output


@pytest.mark.slow
@pytest.mark.parametrize(("retry", "left"), [("true", []), ("[poison_row]", [2]), ("[bad_sampling]", [7])])
def test_failed_rows_are_retried_all_or_by_type(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, retry: str, left: list[int]
) -> None:
    rows = [{"prompt": f"row number {index}", "budget": 3} for index in range(10)]
    conf = write_config(rows, sampling={"from_columns": {"max_tokens": "budget"}})
    job = launcher.dpgen("run", conf, "engine.raise_on=number 7", "engine.refuse_on=number 2")
    assert job.wait() == 0, job.output
    assert {row["row_id"]: row["error"]["type"] for row in load_all_rows(tmp_path / "run", 10) if row["error"]} == {
        2: "bad_sampling",
        7: "poison_row",
    }
    assert "finished result already" in launcher_output(launcher, conf)
    again = launcher.dpgen("run", conf, f"run.retry_errors={retry}")
    assert again.wait() == 0, again.output
    assert [row["row_id"] for row in load_all_rows(tmp_path / "run", 10) if row["error"]] == left


@pytest.mark.slow
def test_a_retry_that_fails_before_its_first_row_leaves_the_finished_result(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(10), engine={"refuse_on": "number 2"})
    launcher_output(launcher, conf)
    success = (tmp_path / "run" / "_SUCCESS").read_text()
    failed = launcher.dpgen("run", conf, "run.retry_errors=true", "engine.load_error=no such device")
    assert failed.wait() != 0, failed.output
    assert (tmp_path / "run" / "_SUCCESS").read_text() == success, "no row was generated, so nothing has changed"
    assert "finished result already" in launcher_output(launcher, conf)
    launcher_output(launcher, conf, "run.retry_errors=true", "engine.refuse_on=null")
    assert (tmp_path / "run" / "_SUCCESS").read_text() != success
    assert not [row for row in load_all_rows(tmp_path / "run", 10) if row["error"]]


@pytest.mark.slow
def test_a_retry_that_is_interrupted_after_its_first_row_leaves_an_unfinished_run(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    engine = {"refuse_on": "row", "max_num_seqs": 4}
    conf = write_config(make_numbered_rows(60), run={"allow_all_errors": True}, engine=engine)
    launcher_output(launcher, conf)
    before = count_journal_bytes(tmp_path / "run")
    retry = ["run.retry_errors=true", "engine.refuse_on=null"]
    job = launcher.dpgen("run", conf, *retry, "engine.step_s=0.05")
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > before)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output
    assert not (tmp_path / "run" / "_SUCCESS").exists(), "the journal holds rows that this result does not"
    launcher_output(launcher, conf, *retry)
    assert not [row for row in load_all_rows(tmp_path / "run", 60) if row["error"]]


def launcher_output(launcher: Launcher, *arguments: str) -> str:
    job = launcher.dpgen("run", *arguments)
    assert job.wait() == 0, job.output
    return job.output
