"""Whole runs of programs on the fake engine: columns, typed errors, kills without a repeated call, divergence."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO, Launcher, WriteConfig, find_engine_pids, load_result, wait_for
from helpers.program_kills import count_repeated_calls, kill_at_random, list_calls
from helpers.results import count_journal_bytes

pytestmark = pytest.mark.multi

PATHS = f"{REPO}:{REPO / 'tests'}"


def run(launcher: Launcher, conf: str, *arguments: str, ranks: int = 1, status: int = 0) -> str:
    job = launcher.dpgen("run", conf, *arguments, ranks=ranks, PYTHONPATH=PATHS)
    assert job.wait() == status, job.output
    return job.output


def write_program(write_config: WriteConfig, rows: list[dict[str, Any]], name: str, **sections: Any) -> str:
    program = {"function": f"helpers.programs:{name}", **sections.pop("program", {})}
    return write_config(rows, data={"prompt_column": None}, program=program, **sections)


@pytest.mark.slow
def test_a_program_that_is_killed_at_any_world_size_repeats_no_call_and_ends_the_same(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    log = tmp_path / "tools"
    rows = [{"prompt": f"p{row}", "log": str(log)} for row in range(40)]
    engine = {"step_s": 0.02, "max_num_seqs": 4}
    conf = write_program(write_config, rows, "branch", engine=engine, run={"report": False})
    assert kill_at_random([conf], tmp_path / "run", 3, random.Random(5)) >= 2
    killed, tools = load_result(tmp_path / "run"), log.read_text().split()
    run(launcher, conf, f"run.dir={tmp_path / 'undisturbed'}")
    assert killed == load_result(tmp_path / "undisturbed")
    assert count_repeated_calls(tmp_path / "run") == 0
    assert len(list_calls(tmp_path / "undisturbed")) == 40 * 8
    # What had returned within half a second before a kill was not journaled yet.
    assert len(tools) <= 40 + 3 * 4 and set(tools) == {row["prompt"] for row in rows}
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output


@pytest.mark.slow
def test_each_way_in_which_a_program_ends_badly_is_its_rows_error_alone(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    expected: dict[str, tuple[str, str]] = {
        "raise": ("program_failed", "KeyError: 'no such key' (programs.py, line "),
        "exit": ("program_failed", "SystemExit: 3 (programs.py, line "),
        "none": ("program_bad_result", "it returned null, and must return a dict of columns"),
        "object": ("program_bad_result", "which is no value of JSON"),
        "wrong type": ("program_bad_result", "$.answer is an int"),
        "lacks": ("program_bad_result", "$ lacks the required property 'answer'"),
        "slow": ("program_timeout", "program.timeout_s=6"),
        "blocks": ("program_timeout", "blocked the event loop"),
        "too many": ("program_too_many_calls", "it makes more calls than program.max_calls=5"),
        "too many, and catches all": ("program_too_many_calls", "program.max_calls=5"),
        "too long": ("prompt_too_long", "call 0: "),
        "tool": ("tool_failed", "call 0: ValueError: invalid literal for int()"),
        "embed": ("unsupported_request", "llm.embed: the engine is loaded to generate"),
    }
    kinds = ["good", *expected, "caught", "good too"]
    program = {"returns": {"answer": "string"}, "timeout_s": 6, "max_calls": 5}
    conf = write_program(write_config, [{"prompt": kind} for kind in kinds], "misbehave", program=program)
    output = run(launcher, conf)
    rows = {row["prompt"]: row for row in load_result(tmp_path / "run")}
    assert rows["good"]["error"] is None and rows["good too"]["answer"], output
    assert rows["caught"]["answer"] == "prompt_too_long"
    assert (rows["good"]["num_calls"], rows["good"]["num_generated_tokens"]) == (1, 2)
    for kind, (error_type, words) in expected.items():
        error = rows[kind]["error"]
        assert error["type"] == error_type and words in error["message"], (kind, error)
        assert rows[kind]["answer"] is None


@pytest.mark.slow
def test_a_program_that_asks_something_else_than_before_is_told_so_and_goes_on(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    version = tmp_path / "version"
    version.write_text("1")
    rows = [{"prompt": f"p{row}", "version": str(version)} for row in range(12)]
    conf = write_program(write_config, rows, "drift", engine={"step_s": 0.05, "max_num_seqs": 12})
    job = launcher.dpgen("run", conf, PYTHONPATH=PATHS)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 6000)
    job.end()
    version.write_text("2")
    output = run(launcher, conf, ranks=2)
    assert "call 1: the program asks something else than before the restart" in output
    assert "the version is 1" in output and "the version is 2" in output
    result = load_result(tmp_path / "run")
    assert len(result) == 12 and not any(row["error"] for row in result)
    texts = [json.loads(row["program"])["texts"] for row in result]
    assert len({row[0] for row in texts}) == 12, "each call has a seed of its row"


@pytest.mark.slow
def test_rows_of_an_abandoned_engine_go_to_other_ranks_with_their_finished_calls(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": f"p{row}"} for row in range(60)]
    engine = {"step_s": 0.01, "max_num_seqs": 4}
    conf = write_program(write_config, rows, "branch", engine=engine, run={"max_engine_deaths": 1})
    job = launcher.dpgen("run", conf, ranks=2, PYTHONPATH=PATHS)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 4000)
    os.kill(find_engine_pids(job)[0], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert "abandoning it" in job.output
    run(launcher, conf, f"run.dir={tmp_path / 'undisturbed'}", "engine.step_s=0")
    assert load_result(tmp_path / "run") == load_result(tmp_path / "undisturbed")
    assert count_repeated_calls(tmp_path / "run") == 0
