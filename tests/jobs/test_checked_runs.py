"""Whole runs whose completions are checked, on the fake engine: retried, resumed without a repeat, explained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import REPO, Launcher, WriteConfig, load_result, read_run_json, wait_for
from helpers.results import count_journal_bytes

from dpgen.journal.attempts import RejectedAttempt, decode_attempt
from dpgen.journal.reader import JournalReader, index_attempts
from dpgen.records import RequestId

pytestmark = pytest.mark.multi

PATHS = f"{REPO}:{REPO / 'tests'}"
SOMETIMES = "helpers.row_checks:fail_sometimes"


def run(launcher: Launcher, conf: str, *arguments: str, ranks: int = 1, status: int = 0) -> str:
    job = launcher.dpgen("run", conf, *arguments, ranks=ranks, PYTHONPATH=PATHS)
    assert job.wait() == status, job.output
    return job.output


def verify(launcher: Launcher, run_dir: Path) -> None:
    verified = launcher.dpgen("verify", str(run_dir))
    assert verified.wait() == 0, verified.output


def list_attempts(run_dir: Path) -> list[RejectedAttempt]:
    """Return the rejected attempts in a journal."""
    index, _ = index_attempts(run_dir / "journal", lambda rows: np.ones(len(rows), dtype=bool))
    with JournalReader(index) as reader:
        return [decode_attempt(reader.payload(position)) for position in range(len(index))]


@pytest.mark.slow
def test_a_run_that_is_killed_repeats_no_attempt_at_any_world_size(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    log = tmp_path / "attempts"
    conf = write_config(
        [{"prompt": f"p{row}", "log": str(log)} for row in range(120)],
        engine={"step_s": 0.01, "max_num_seqs": 8},
        sampling={"max_tokens": 6, "n": 2},
        check={"function": "helpers.row_checks:log_and_fail_sometimes", "max_attempts": 4, "keep_rejected": True},
    )
    job = launcher.dpgen("run", conf, PYTHONPATH=PATHS)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 4000)
    job.end()
    before = Counter(log.read_text().splitlines())
    output = run(launcher, conf, "engine.step_s=0", ranks=2)
    assert "retries (function: " in output and "of generated tokens in rejected attempts" in output
    counts = Counter(log.read_text().splitlines())
    # What was not synced at the kill is generated again: half a second of a small engine. All else is not.
    repeated = [name for name, count in counts.items() if count > 1]
    assert len(repeated) < len(before) / 2, (len(repeated), len(before))
    rows = load_result(tmp_path / "run")
    assert run(launcher, conf, "engine.step_s=0", f"run.dir={tmp_path / 'undisturbed'}")
    assert rows == load_result(tmp_path / "undisturbed"), "a restart changes no attempt"
    assert any(row["error"] for row in rows) and not all(row["error"] for row in rows)
    for row in rows:
        is_failed = [text is not None for text in row["rejected_text"]]
        assert [text is None for text in row["generated_text"]] == is_failed, "the other keeps its place"
        assert (row["error"] is not None) == any(is_failed)
        if row["error"]:
            assert row["error"]["type"] == "check_failed" and "samples failed: sample " in row["error"]["message"]
    verify(launcher, tmp_path / "run")
    manifests = read_run_json(tmp_path / "undisturbed")["manifests"]
    assert manifests[0]["num_retries"]["function"] > 0 and manifests[0]["num_rejected_tokens"] > 0


@pytest.mark.slow
def test_a_check_that_crashes_hangs_or_raises_costs_its_row_an_attempt(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": prompt} for prompt in ("exit", "a", "hang", "b", "raise")]
    conf = write_config(rows, check={"function": "helpers.row_checks:misbehave", "timeout_s": 1})
    output = run(launcher, conf)
    assert "3 retries (function: 3)" in output
    assert [row["error"] for row in load_result(tmp_path / "run")] == [None] * 5
    again = run(launcher, conf, f"run.dir={tmp_path / 'once'}", "check.max_attempts=1")
    assert "3 check_failed" in again
    messages = [row["error"] and row["error"]["message"] for row in load_result(tmp_path / "once")]
    assert messages == [
        "function: the check process died (exit status 3) (after 1 attempt)",
        None,
        "function: the check took longer than 1 s (after 1 attempt)",
        None,
        "function: it raised KeyError: 'no such key' (after 1 attempt)",
    ]


@pytest.mark.slow
def test_each_exploded_sample_has_its_own_error_and_retrying_has_other_seeds(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        [{"prompt": f"p{row}"} for row in range(40)],
        sampling={"n": 2},
        output={"explode": True},
        check={"function": SOMETIMES, "max_attempts": 1, "keep_rejected": True},
    )
    run(launcher, conf)
    rows = load_result(tmp_path / "run")
    assert [(row["row_id"], row["sample_id"]) for row in rows] == [(i, k) for i in range(40) for k in range(2)]
    failed = {(row["row_id"], row["sample_id"]) for row in rows if row["error"]}
    assert failed and len({row for row, _ in failed}) < len(failed) < 80
    for row in rows:
        is_failed = (row["row_id"], row["sample_id"]) in failed
        assert (row["generated_text"] is None) == (row["num_generated_tokens"] is None) == is_failed
        assert (row["rejected_text"] is not None) == is_failed
    verify(launcher, tmp_path / "run")
    run(launcher, conf, "run.retry_errors=[check_failed]")
    again = {(row["row_id"], row["sample_id"]): row for row in load_result(tmp_path / "run")}
    assert len(again) == 80
    still = {key for key, row in again.items() if row["error"]}
    assert still == failed, "this check depends on the attempt's number among those of a try alone"
    attempts = [list_attempts(tmp_path / "run")]
    run(launcher, conf, "run.retry_errors=[check_failed]")
    attempts.append(list_attempts(tmp_path / "run"))
    rows_of_failed = sorted({row for row, _ in failed})
    for count, found in zip((2, 3), attempts, strict=True):
        ids = sorted(attempt.id for attempt in found)
        assert ids == [RequestId(row, attempt=number) for row in rows_of_failed for number in range(count)]
        texts = {attempt.result.completions[0].text for attempt in found}
        assert len(texts) == len(found), "each attempt has a seed of its own, and so another text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["check.function=helpers.row_checks:nope"],
            "check.function=helpers.row_checks:nope: helpers.row_checks has no",
        ),
        (["check.function=helpers.programs:drift"], "check.function=helpers.programs:drift: is async, and must return"),
        (["check.json_schema={type: objekt}"], "check.json_schema is no JSON Schema, at $.type"),
        (["check.non_empty=true", "check.retry_sampling={temperatur: 1}"], "did you mean 'check.retry_sampling.temper"),
    ],
)
def test_a_check_that_can_not_work_is_refused_once_before_a_model_loads(
    launcher: Launcher, write_config: WriteConfig, arguments: list[Any], message: str
) -> None:
    conf = write_config([{"prompt": "x"}])
    output = run(launcher, conf, *arguments, ranks=1, status=2)
    assert output.count(message) == 1 and "KV cache" not in output, output


def test_checks_belong_to_what_a_run_is(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config([{"prompt": "x"}])
    run(launcher, conf)
    output = run(launcher, conf, "check.non_empty=true", status=2)
    assert "check" in output and "run.resume=force" in output, output


@pytest.mark.slow
def test_results_are_the_same_whatever_dies_and_however_engines_are_laid_out(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        [{"prompt": f"p{row}"} for row in range(60)], check={"function": SOMETIMES, "keep_rejected": True}
    )
    run(launcher, conf)
    expected = load_result(tmp_path / "run")
    ways: dict[str, tuple[int, list[str]]] = {
        "deaths": (1, ["engine.crash_on=p3", "engine.max_faults=3", f"engine.fault_dir={tmp_path}"]),
        "lockstep": (2, ["parallel.launcher=external", "parallel.lock_step=true"]),
        "external": (2, ["parallel.launcher=external", "parallel.tensor_parallel_size=2"]),
    }
    for name, (ranks, arguments) in ways.items():
        run(launcher, conf, f"run.dir={tmp_path / name}", *arguments, ranks=ranks)
        assert load_result(tmp_path / name) == expected, name
