"""`dpgen tune`: trials on the fake engine, the overlay, resuming, and what is refused; tests/tuning has the search."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from helpers.clock import FakeClock
from helpers.jobs import Launcher, WriteConfig, load_result, make_numbered_rows, read_run_json, wait_for

from dpgen.api.jobs import Outcome, RankJob
from dpgen.cli import main
from dpgen.commands.tune import parse_budget, parse_methods
from dpgen.commands.tune_job import TuneJob, TuneOptions
from dpgen.errors import ConfigError, DpgenError, EngineError, Interrupted, RanksLost
from dpgen.journal.reader import index_journal
from dpgen.tuning.trial import Budget, Measurement, TrialPlan, TrialResult, get_trial_path

SLOW = {"step_s": 0.02, "max_num_seqs": 4}
ROWS = make_numbered_rows(3000)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def read_trials(run_dir: Path) -> list[Any]:
    path = run_dir / "tuning" / "trials.json"
    return list(json.loads(path.read_text())["trials"]) if path.exists() else []


@pytest.mark.slow
@pytest.mark.multi
def test_rows_of_trials_count_and_an_interrupted_search_continues(
    write_config: WriteConfig, launcher: Launcher, tmp_path: Path
) -> None:
    conf, overlay, run_dir = write_config(ROWS, engine=SLOW), tmp_path / "tuned.yaml", tmp_path / "run"
    arguments = ["tune", conf, "--output", str(overlay), "--json"]
    first = launcher.dpgen(*arguments, "--budget", "9s")
    assert first.wait() == 0, first.output
    shown = json.loads(first.output.splitlines()[-1])
    assert shown["trials"][0]["overrides"] == {}, "the job as it is configured comes first"
    assert shown["num_rows_done"] > 0
    assert yaml.safe_load(overlay.read_text()) == {"engine": {"max_num_seqs": shown["best"]["engine.max_num_seqs"]}}

    again = launcher.dpgen(*arguments, "--budget", "1h")
    wait_for(lambda: read_run_json(run_dir)["attempt"] == 2 or again.process.poll() is not None)
    again.process.send_signal(signal.SIGTERM)
    assert again.wait() == 75, again.output
    assert "continuing after 1 trial of an earlier start" in again.output
    assert "trial 1: " not in again.output, "no trial is repeated"
    assert len(read_trials(run_dir)) == 1

    num_done = len(set(index_journal(run_dir / "journal").row.tolist()))
    assert num_done >= shown["num_rows_done"]
    job = launcher.dpgen("run", conf, str(overlay), "engine.step_s=0")
    assert job.wait() == 0, job.output
    assert f"{num_done:,} of 3,000 rows are done" in job.output
    assert len(load_result(run_dir)) == 3000
    assert read_run_json(run_dir)["engine"]["max_num_seqs"] == shown["best"]["engine.max_num_seqs"]
    shown_again = launcher.dpgen(*arguments, "--budget", "9s")
    assert shown_again.wait() == 0, shown_again.output
    repeated = json.loads(shown_again.output.splitlines()[-1])
    assert (repeated["best"], repeated["reason"]) == (shown["best"], shown["reason"]), "the search had ended by itself"


@pytest.mark.slow
@pytest.mark.multi
def test_the_ranks_of_torchrun_are_measured_together(
    write_config: WriteConfig, launcher: Launcher, tmp_path: Path
) -> None:
    conf = write_config(ROWS, engine={"step_s": 0.1, "max_num_seqs": 64})
    job = launcher.dpgen("tune", conf, "--budget", "8s", "--output", str(tmp_path / "tuned.yaml"), ranks=2)
    assert job.wait() == 0, job.output
    [trial] = read_trials(tmp_path / "run")
    assert trial["num_ranks"] == trial["num_engines"] == 2
    assert "torchrun --nproc-per-node 2 -m dpgen run" in job.output


@pytest.mark.slow
@pytest.mark.multi
def test_a_killed_torchrun_leaves_no_trials(write_config: WriteConfig, launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.dpgen("tune", write_config(ROWS, engine=SLOW), "--budget", "1h", ranks=2)
    wait_for(lambda: (tmp_path / "run" / "run.json").exists() or job.process.poll() is not None)
    below = psutil.Process(job.process.pid).children(recursive=True)
    assert len(below) >= 4, "the command, twice, its own torchrun, and ranks"
    job.process.kill()
    wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in below))


@pytest.mark.multi
def test_a_job_that_a_trial_finishes_is_done(write_config: WriteConfig, launcher: Launcher, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(20))
    job = launcher.dpgen("tune", conf, "--output", str(tmp_path / "tuned.yaml"))
    assert job.wait() == 0, job.output
    assert "the job's last row was finished meanwhile" in job.output
    assert len(load_result(tmp_path / "run")) == 20
    assert not (tmp_path / "tuned.yaml").exists(), "nothing was measured"
    same = launcher.dpgen("tune", conf, "--output", str(tmp_path / "tuned.yaml"))
    assert same.wait() == 0 and "the job's last row was finished meanwhile" in same.output
    assert "trial 1: " not in same.output and "trial 2: " not in same.output, "no row is left to start engines for"
    again = launcher.dpgen("tune", conf, "data.limit=20", "--output", str(tmp_path / "tuned.yaml"))
    assert again.wait() == 2
    assert "holds a complete result: no row is left to measure with" in again.output


def test_the_time_limit_is_of_the_whole_search(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr("dpgen.commands.tune_job.time", SimpleNamespace(monotonic=clock))
    job = TuneJob(TuneOptions([write_config(ROWS), "run.time_limit=0:01:00"]))
    clock.now_s += 45
    config = job.make_config(TrialPlan(2, {}))
    assert job._limit_time(config).run.time_limit == "15", "a trial has what is left"
    clock.now_s += 15
    with pytest.raises(Interrupted, match=r"^run.time_limit=0:01:00 is near\. Rerun the same command to resume$"):
        job._limit_time(config)


class ScriptedRanks:
    """Answer each trial with what the ranks would: a measurement or none, an error, an interruption."""

    def __init__(self, outcomes: list[tuple[bool, Outcome]], *, interrupted: bool = False) -> None:
        self._outcomes, self.was_interrupted = outcomes, interrupted
        self.trials: list[TrialPlan] = []

    def submit(self, job: RankJob) -> None:
        assert job.trial is not None
        self.trials.append(job.trial)

    def wait(self, on_wait: Any) -> Outcome:
        is_measured, outcome = self._outcomes[len(self.trials) - 1]
        plan = self.trials[-1]
        if is_measured:
            stage = Measurement(4, 100.0, 1.0, 50, 500, 5.0)
            result = TrialResult(plan.number, dict(plan.overrides), (stage,), 1.0, 6.0, 50, 3000, 16, reason="measured")
            path = get_trial_path(Path(plan.folder), plan.number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result.to_json()))
        return outcome

    def close(self) -> None:
        pass


def run_scripted(conf: str, ranks: ScriptedRanks, *arguments: str) -> TuneJob:
    job = TuneJob(TuneOptions([conf, *arguments], budget=Budget(seconds=3600.0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_get_ranks", lambda number: ranks)
        patch.setattr(job, "_ranks", ranks)
        job.run()
    return job


ENDED = Outcome.of_error(0, Interrupted("trial 1 has ended: measured"))


@pytest.mark.parametrize("outcome", [Outcome.of_error(0, Interrupted("interrupted by SIGTERM")), ENDED])
def test_an_interruption_ends_the_search_though_the_trial_was_measured(
    outcome: Outcome, write_config: WriteConfig, tmp_path: Path
) -> None:
    ranks = ScriptedRanks([(True, outcome)], interrupted=outcome is ENDED)
    with pytest.raises(Interrupted, match="interrupted"):
        run_scripted(write_config(ROWS, engine=SLOW), ranks)
    assert len(ranks.trials) == len(read_trials(tmp_path / "run")) == 1, "what was measured counts"


@pytest.mark.parametrize(
    "error",
    [
        RanksLost("the rank process ended without a word (killed by SIGKILL)"),
        ConfigError("run.dir=run is in use by another live run: wait for that run"),
        ConfigError("data.path=rows.jsonl: there is no such file"),
    ],
)
def test_what_says_nothing_about_the_settings_ends_the_command_and_is_tried_again(
    error: DpgenError, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(ROWS, engine=SLOW)
    with pytest.raises(type(error), match=re.escape(str(error))):
        run_scripted(conf, ScriptedRanks([(True, ENDED), (False, Outcome.of_error(0, error))]))
    assert len(read_trials(tmp_path / "run")) == 1
    again = ScriptedRanks([(False, Outcome.of_error(0, error))])
    with pytest.raises(type(error)):
        run_scripted(conf, again)
    assert [plan.number for plan in again.trials] == [2]


def test_failures_of_the_jobs_own_settings_are_not_kept(write_config: WriteConfig, tmp_path: Path) -> None:
    full = EngineError("the engine process was killed by SIGKILL", signal=signal.SIGKILL)
    failed = [(False, Outcome.of_error(0, full))] * 2
    conf = write_config(ROWS, engine=SLOW)
    for _ in range(2):
        ranks = ScriptedRanks(failed)
        with pytest.raises(DpgenError, match="the job's own settings could not be measured") as caught:
            run_scripted(conf, ranks)
        assert len(ranks.trials) == 2 and caught.value.is_resumable
        assert read_trials(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.multi
def test_warnings_of_the_trials_are_shown_once(write_config: WriteConfig, launcher: Launcher, tmp_path: Path) -> None:
    engine = {**SLOW, "raise_on": "row number 7", "max_faults": 2, "fault_dir": str(tmp_path / "faults")}
    (tmp_path / "faults").mkdir()
    job = launcher.dpgen(
        "tune", write_config(make_numbered_rows(40), engine=engine), "--output", str(tmp_path / "best")
    )
    assert job.wait() == 0, job.output
    warnings = [line for line in job.output.splitlines() if " WARNING " in line]
    texts = [line.partition("] ")[2] for line in warnings]
    assert len(texts) == len(set(texts)) and any("restarting it" in text for text in texts), job.output
    assert "rows over 1 rank" not in job.output, "nothing else of the ranks"


def test_an_overlay_may_be_tuned_further_only_as_the_last_file(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overlay, other = tmp_path / "tuned.yaml", tmp_path / "other.yaml"
    overlay.write_text("# Written by dpgen tune\nengine: {max_num_seqs: 8}\n")
    other.write_text("engine: {max_num_seqs: 4}\n")
    assert main(["tune", write_config(ROWS), str(overlay), str(other), "--output", str(overlay)]) == 2
    assert "the file is part of the configuration, and others follow it" in capfd.readouterr().err


@pytest.mark.multi
def test_a_job_that_can_not_run_is_an_error_and_not_a_table(write_config: WriteConfig, launcher: Launcher) -> None:
    broken = launcher.dpgen("tune", write_config(ROWS, engine={"load_error": "no such GPU"}), DPGEN_START_RETRY_S="0")
    assert broken.wait() == 1
    assert "no such GPU" in broken.output.splitlines()[-1]


def test_wrong_arguments_are_refused_before_anything_starts(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conf = write_config(ROWS)
    taken = tmp_path / "taken.yaml"
    taken.write_text("model: mine\n")
    for arguments, message in [
        ([], "no configuration"),
        ([conf, "--budget", "soon"], "--budget=soon: must be a share of the job's time, as 5%"),
        ([conf, "--speculative", "eagle"], "'eagle' must be one of ngram, suffix"),
        ([conf, "--output", str(taken)], "the file is there, and not of dpgen tune"),
        ([conf, "--output", str(tmp_path / "no" / "tuned.yaml")], "there is no directory"),
        ([conf, "engine.max_num_seq=4", "run.resume=never"], "run.resume=never: the rows of a trial"),
        ([conf, "engines.max_num_seqs=4"], "engines"),
    ]:
        assert main(["tune", *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write to any folder
    assert main(["tune", conf, "--output", str(tmp_path / "tuned.yaml")]) == 2
    assert f"can't be written: no permission for {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_launchers_and_several_machines_are_refused(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**world, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert main(["tune", write_config(ROWS)]) == 2
    assert "measures one machine, and torchrun has started 4 ranks on several" in capsys.readouterr().err


def test_budgets_are_shares_or_times() -> None:
    assert parse_budget("5%") == Budget(fraction=0.05)
    assert parse_budget("90") == parse_budget("90s") == Budget(seconds=90)
    assert parse_budget("1.5h") == Budget(seconds=5400)
    for text in ("0", "-5s", "5 minutes", ""):
        with pytest.raises(ConfigError):
            parse_budget(text)
    assert parse_methods("ngram, suffix") == ["ngram", "suffix"]


def test_a_trial_that_draws_other_samples_leaves_the_run_alone(write_config: WriteConfig, tmp_path: Path) -> None:
    job = TuneJob(TuneOptions([write_config(ROWS), "run.dir=out"]))
    speculative = job.make_config(TrialPlan(2, {"engine.speculative_config": {"method": "ngram"}}))
    assert speculative.run.dir == str(tmp_path / "out" / "tuning" / "other-draws")
    assert speculative.engine["speculative_config"] == {"method": "ngram"}
    assert job.make_config(TrialPlan(2, {"engine.max_num_seqs": 9})).run.dir == "out"


def test_all_trials_accept_the_results_that_the_command_accepts(write_config: WriteConfig) -> None:
    job = TuneJob(TuneOptions([write_config(ROWS), "run.resume=force"]))
    assert [job.make_config(TrialPlan(number, {})).run.resume for number in (1, 2)] == ["force", "force"]


def test_ranks_that_share_a_gpu_cost_one(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpgen.commands.tune_job.read_gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("dpgen.commands.tune_job.list_visible_gpus", lambda *arguments, is_quiet: ["0"])
    arguments = [write_config(ROWS, run={"engine": "vllm"}), "parallel.share_devices=true"]
    assert TuneJob(TuneOptions(arguments, num_ranks=2)).num_gpus == 1


def test_a_trial_of_another_division_of_the_gpus_has_as_many_ranks_as_fit(write_config: WriteConfig) -> None:
    job = TuneJob(TuneOptions([write_config(ROWS), "parallel.tensor_parallel_size=2"], num_ranks=2))
    assert job.count_ranks_of({"parallel.tensor_parallel_size": 4}) == 1
    assert job.count_ranks_of({"parallel.tensor_parallel_size": 1}) == 4
