"""Whole runs that parse what the engine generates, on the fake engine: nothing lost by kills, bad keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Launcher, WriteConfig, load_result, wait_for

pytestmark = pytest.mark.multi


@pytest.mark.slow
def test_a_run_killed_while_it_parses_is_resumed_and_verifies(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        [{"prompt": f"question {row}"} for row in range(60)],
        engine={"step_s": 0.01},
        sampling={"max_tokens": 8, "n": 2, "logprobs": 1},
        output={"parse": "json", "format": "jsonl"},
    )
    job = launcher.dpgen("run", conf)
    journal = tmp_path / "run" / "journal"
    wait_for(lambda: sum(path.stat().st_size for path in journal.glob("*.journal")) > 2000)
    job.end()
    again = launcher.dpgen("run", conf)
    assert again.wait() == 0, again.output
    rows = load_result(tmp_path / "run")
    assert [row["row_id"] for row in rows] == list(range(60))
    for row in rows:
        assert row["parsed"] == [None, None]
        assert all(error.startswith("no JSON: ") for error in row["parse_error"]), "the fake engine writes no JSON"
        assert all(row["generated_text"]), "the text stays"
        assert [len(values) for values in row["token_logprobs"]] == [8, 8], "what parsers do not need is kept"
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output
    other = launcher.dpgen("run", conf, "output.parse=text")
    assert other.wait() == 2 and 'output.parse: "json" → null' in other.output, "the result would have other columns"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output.reasoning_parser=qwen3"], "output.reasoning_parser has no effect: set output.reasoning="),
        (["output.parse=yaml"], "output.parse"),
        (["output.reasoning=hide"], "output.reasoning"),
    ],
)
def test_a_key_that_can_not_work_is_refused(
    launcher: Launcher, write_config: WriteConfig, arguments: list[Any], message: str
) -> None:
    conf = write_config([{"prompt": "x"}])
    job = launcher.dpgen("run", conf, *arguments)
    assert job.wait() == 2 and message in job.output
