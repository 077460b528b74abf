"""`dpgen slurm` and requeueing, without SLURM; tests/jobs/test_slurm.py runs both under SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.jobs import REPO, WriteConfig, make_numbered_rows

from dpgen.cli import main
from dpgen.commands.slurm import script_for
from dpgen.errors import ConfigError
from dpgen.lifecycle import requeue
from dpgen.lifecycle.requeue import AttemptStatus, count_attempts_without_progress, find_reason_not_to_requeue

GOLDEN = REPO / "tests" / "golden"
CONF = str(REPO / "conf" / "jsonl.yaml")
CONF_TP4 = str(REPO / "conf" / "70b_tp4.yaml")


# ---- the script


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("slurm.sbatch", ["--nodes", "4", "--gpus-per-node=8", "--time", "4:00:00", "--exclusive"]),
        (
            "slurm_torchrun.sbatch",
            ["--torchrun", "--nodes=2", "--gres", "gpu:a100:4", "--no-requeue", "run.dir=runs/it's mine"],
        ),
    ],
)
def test_the_script_is_the_recorded_one(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    script, submit = script_for(["conf/jsonl.yaml", *arguments], python="/opt/venv/bin/python")
    assert not submit
    golden = GOLDEN / name
    if os.environ.get("DPGEN_RECORD"):
        golden.write_text(script)
    assert script == golden.read_text(), (
        "`dpgen slurm` prints another script than tests/golden holds. If that is intended, record it again: "
        "DPGEN_RECORD=1 python -m pytest tests/commands/test_slurm_command.py; then read the difference: "
        "git diff tests/golden"
    )


@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_torchrun.sbatch"])
def test_there_is_one_copy_of_each_script(name: str) -> None:
    assert (REPO / "launch" / name).resolve() == REPO / "dpgen" / "commands" / name


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sbatch")), ids=lambda path: path.name)
def test_bash_parses_the_script_and_sbatch_reads_all_its_directives(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text().splitlines()
    body = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert directives == [line for line in lines[:body] if line.startswith("#SBATCH")], "sbatch reads no further"
    names = [line.split("--")[1].partition("=")[0] for line in directives]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("conf", "options", "ranks"),
    [
        (CONF, ["--gpus-per-node", "8"], "8"),
        (CONF_TP4, ["--gpus-per-node=a100:8"], "2"),
        (CONF_TP4, ["--gres=lustre:1,gpu:8", "--ntasks-per-node=2"], "2"),
        (CONF, ["--gres=gpu"], "1"),
        (CONF, ["--gres=gpu:h100"], "1"),
        (CONF, ["--ntasks-per-node", "6"], "6"),
        (CONF, ["parallel.share_devices=true", "--ntasks-per-node", "6", "--gpus-per-node", "2"], "6"),
        (CONF, [], "1"),
    ],
)
def test_the_number_of_ranks_on_a_node_follows_from_its_gpus(conf: str, options: list[str], ranks: str) -> None:
    assert f"#SBATCH --ntasks-per-node={ranks}\n" in script_for([conf, *options])[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no configuration"),
        ([CONF, "-N", "2"], "-N: write sbatch's options in their long form"),
        ([CONF, "--nodes"], "--nodes needs a value, as in --nodes=VALUE"),
        ([CONF, "--nodes", "--exclusive"], "--nodes needs a value"),
        ([CONF, "run.dri=x"], "did you mean 'run.dir'"),
        ([CONF_TP4, "--gpus-per-node", "2"], "one rank needs 4 GPUs .* and a node gives 2"),
        ([CONF_TP4, "--gpus-per-node", "8", "--ntasks-per-node", "8"], "8 GPUs a node make 2 ranks of 4: give 2"),
        (["nowhere.yaml"], "no such configuration file"),
    ],
)
def test_wrong_usage_is_rejected_before_a_job_waits_in_a_queue(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        script_for(arguments)


def test_a_flag_takes_no_value_from_the_argument_after_it() -> None:
    assert f"set -- {CONF}\n" in script_for(["--exclusive", CONF])[0]


def test_the_command_takes_files_keys_and_any_option_of_sbatch_in_any_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--signal", "USR1@30", "run.seed=-1", "--torchrun", "--site-plugin=on", CONF, "--nodes", "4", "--hold"]
    assert main(["slurm", *arguments, "run.dir=-x"]) == 2, "run.seed must not be negative"
    assert "run.seed" in capsys.readouterr().err
    arguments.remove("run.seed=-1")
    assert main(["slurm", *arguments, "run.dir=-x"]) == 0
    script = capsys.readouterr().out
    assert "torch.distributed.run" in script and f"set -- {CONF} run.dir=-x\n" in script
    for directive in ("--signal=USR1@30", "--site-plugin=on", "--nodes=4", "--hold"):
        assert f"#SBATCH {directive}\n" in script


def test_a_script_is_submitted_with_the_answer_and_status_of_sbatch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, expected in ((0, 0), (3, 1)):
        fake_program(tmp_path, "sbatch", f"cat > {tmp_path}/script; echo Submitted batch job 7; exit {status}")
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert main(["slurm", CONF, "--submit", "--nodes=4"]) == expected
        assert capfd.readouterr().out == "Submitted batch job 7\n"
        assert "#SBATCH --nodes=4\n" in (tmp_path / "script").read_text()


def test_without_slurm_submitting_fails_with_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["slurm", CONF, "--submit"]) == 1
    assert "there is no sbatch here" in capsys.readouterr().err


def fake_program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_the_script_runs_its_configuration(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script runs in bash, with a stand-in for srun that runs one task."""
    monkeypatch.chdir(tmp_path)
    script, _ = script_for([write_config(make_numbered_rows(5)), "run.dir=runs/it's mine"])
    fake_program(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NODELIST": "n0",
    }
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "dpgen: the run is complete" in done.stdout
    assert (tmp_path / "runs" / "it's mine" / "_SUCCESS").exists()
    assert (tmp_path / "dpgen-7" / "attempt-0" / "status").read_text() == "0 5\n"


# ---- requeueing


def resumable(*numbers: int | None) -> list[AttemptStatus | None]:
    """Return statuses of resumable attempts with these numbers of done rows."""
    return [AttemptStatus(75, number) for number in numbers]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (resumable(5), 0),
        (resumable(0), 1),
        (resumable(None, None), 2),
        (resumable(5, 9, 9, 8), 2),
        (resumable(5, 5, 5, 6), 0),
        ([*resumable(5, 5), None, None, *resumable(5)], 2),
    ],
)
def test_attempts_without_a_new_row_are_counted(history: list[AttemptStatus | None], expected: int) -> None:
    assert count_attempts_without_progress(history) == expected


RUNNING = {"JobState": "RUNNING", "Reason": "None"}


@pytest.mark.parametrize(
    ("history", "job", "expected"),
    [
        (resumable(5), RUNNING, ""),
        (resumable(5), {"JobState": "COMPLETING", "Reason": "TimeLimit"}, ""),
        (resumable(5), {"JobState": "COMPLETING", "Reason": "None"}, "SLURM is ending the job"),
        (resumable(5), {}, "state unknown"),
        (resumable(5, 5, 5, 5), RUNNING, "3 attempts in a row ended without a new row"),
        (resumable(*range(1, 12)), RUNNING, "requeued 10 times"),
    ],
)
def test_a_job_is_requeued_only_if_it_runs_makes_progress_and_is_below_the_limit(
    history: list[AttemptStatus | None], job: dict[str, str], expected: str
) -> None:
    reason = find_reason_not_to_requeue(history, job, max_requeues=10, max_without_progress=3)
    assert expected in reason and bool(reason) == bool(expected)


@pytest.mark.parametrize(
    ("status", "step_status", "expected", "requeued"),
    [
        ("0 9\n", 137, 0, False),  # one rank was killed, and the others completed the run
        ("75 9\n", 1, 75, True),
        ("1 9\n", 1, 1, False),
        ("2 ?\n", 2, 2, False),
        (None, 1, 1, False),
        (None, 0, 1, False),
        ("damaged", 143, 143, False),
    ],
)
def test_only_a_run_whose_status_is_resumable_is_requeued(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str | None,
    step_status: int,
    expected: int,
    requeued: bool,
) -> None:
    calls = tmp_path / "calls"
    fake_program(tmp_path, "scontrol", f'echo "$@" >> {calls}; echo "JobId=7 JobState=RUNNING Reason=None"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    log_dir = tmp_path / "attempt-0"
    log_dir.mkdir()
    if status is not None:
        (log_dir / "status").write_text(status)
    assert requeue.main([str(log_dir), str(step_status)], {"SLURM_JOB_ID": "7"}) == expected
    assert ("requeue 7" in calls.read_text() if calls.exists() else False) == requeued


def test_if_slurm_refuses_to_requeue_the_job_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_program(tmp_path, "scontrol", '[[ $1 != requeue ]] && echo "JobState=RUNNING Reason=None"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "attempt-1").mkdir()
    (tmp_path / "attempt-1" / "status").write_text("75 3\n")
    assert requeue.main([str(tmp_path / "attempt-1"), "75"], {"SLURM_JOB_ID": "7"}) == 75
    assert "SLURM refused to requeue job 7" in capfd.readouterr().out


def test_the_module_runs_as_the_scripts_call_it(tmp_path: Path) -> None:
    (tmp_path / "attempt-0").mkdir()
    (tmp_path / "attempt-0" / "status").write_text("0 3\n")
    command = [sys.executable, "-m", "dpgen.requeue", str(tmp_path / "attempt-0"), "0"]
    assert subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.startswith("dpgen: the")
