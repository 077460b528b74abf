"""Rows that fail: one bad row costs one row, and a run in which all rows fail stops early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Launcher, WriteConfig, load_result

pytestmark = pytest.mark.multi


@pytest.mark.slow
def test_a_bad_row_gets_a_typed_error_and_the_other_rows_are_generated(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "good", "budget": 3} for _ in range(12)]
    rows[2]["prompt"] = "x" * 600
    rows[5]["budget"] = -1
    rows[7]["prompt"] = None
    conf = write_config(rows, sampling={"from_columns": {"max_tokens": "budget"}})
    job = launcher.dpgen("run", conf, ranks=2)
    assert job.wait() == 0
    assert "1 bad_sampling, 1 prompt_too_long, 1 wrong_type (first: row 2: prompt_too_long" in job.output
    results = load_result(tmp_path / "run")
    assert {row["row_id"]: row["error"]["type"] for row in results if row["error"]} == {
        2: "prompt_too_long",
        5: "bad_sampling",
        7: "wrong_type",
    }
    assert all(row["num_generated_tokens"] == 3 for row in results if not row["error"])
    assert all(row["generated_text"] is None for row in results if row["error"])


@pytest.mark.slow
def test_a_run_whose_rows_all_fail_stops_and_shows_why(launcher: Launcher, write_config: WriteConfig) -> None:
    rows = [{"prompt": "x" * 600} for _ in range(300)]
    job = launcher.dpgen("run", write_config(rows), "run.max_leading_errors=100", ranks=2)
    assert job.wait() == 1
    assert job.output.count("rows all failed") == 1, job.output
    assert "prompt_too_long" in job.output


@pytest.mark.slow
def test_a_run_in_which_no_row_succeeded_ends_with_1_however_often_it_is_started(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config([{"prompt": None}, {"prompt": None}, {"prompt": "x" * 600}])
    job = launcher.dpgen("run", conf)
    assert job.wait() == 1
    problem = "no row succeeded: all 3 rows have an error, 2 of them wrong_type"
    assert f"dpgen: error: {problem} (first: row 0: wrong_type: prompt is null, not a string)" in job.output
    assert "generated 0 rows, 0 tokens" in job.output and "(0 tokens/s), 3 rows failed" in job.output
    assert len(load_result(tmp_path / "run")) == 3, "the result is there"
    again = launcher.dpgen("run", conf)
    assert again.wait() == 1 and f"dpgen: error: {problem}" in again.output, again.output
    assert launcher.dpgen("run", conf, "run.allow_all_errors=true").wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [3, 20])
def test_a_wrong_setting_that_failed_all_rows_is_mended_as_the_message_says(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, num_rows: int
) -> None:
    conf = write_config([{"prompt": "good", "number": 1}] * num_rows, run={"max_leading_errors": 5})
    job = launcher.dpgen("run", conf, "data.prompt_column=number")
    assert job.wait() == 1
    [advice] = [line for line in job.output.splitlines() if line.startswith("dpgen: error: ")]
    remedies = [key for key in ("run.retry_errors=true", "run.resume=force") if key in advice]
    assert launcher.dpgen("run", conf, *remedies).wait() == 0
    assert [row["error"] for row in load_result(tmp_path / "run")] == [None] * num_rows


@pytest.mark.slow
def test_rows_that_fail_first_do_not_stop_a_run_whose_good_rows_are_still_running(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": None if index % 2 else "good"} for index in range(400)]
    conf = write_config(rows, engine={"max_num_seqs": 400, "step_s": 0.2})
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    assert sum(row["error"] is None for row in load_result(tmp_path / "run")) == 200


@pytest.mark.slow
def test_slow_rows_that_fail_first_do_not_stop_a_run_whose_good_rows_come_last(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"kind": "bad", "size": 9} for _ in range(300)] + [{"kind": "good", "size": 1} for _ in range(20)]
    # Each bad row takes many milliseconds, so that syncs see nothing but errors for some seconds.
    template = "{% for _ in range(90000) if kind == 'bad' %}{% endfor %}{{ kind if kind == 'good' else 1 / 0 }}"
    work = {"order": "longest_first", "hint_column": "size"}
    conf = write_config(rows, data={"prompt_column": None, "template": template}, work=work)
    job = launcher.dpgen("run", conf, "run.max_leading_errors=10")
    assert job.wait() == 0, job.output
    assert [row["row_id"] for row in load_result(tmp_path / "run") if not row["error"]] == list(range(300, 320))


@pytest.mark.slow
def test_failed_rows_may_fail_again_in_a_finished_run(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config([{"prompt": None if row < 30 else "good"} for row in range(40)])
    limit = "run.max_leading_errors=20"
    assert launcher.dpgen("run", conf, limit).wait() == 0
    job = launcher.dpgen("run", conf, limit, "run.retry_errors=true")
    assert job.wait() == 0, job.output
    assert sum(row["error"] is not None for row in load_result(tmp_path / "run")) == 30


@pytest.mark.slow
@pytest.mark.parametrize("order", ["longest_first", "dataset"], ids=["rendered to order rows", "rendered to generate"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_whose_rendering_hangs_becomes_an_error_and_the_other_rows_are_generated(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, order: str, ranks: int
) -> None:
    rows = [{"text": "hang" if row == 3 else "good"} for row in range(8)]
    loops = "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if text == 'hang' %}}{loops}{{% endif %}}{{{{ text }}}}"
    data = {"prompt_column": None, "template": template, "render_timeout_s": 0.5}
    job = launcher.dpgen("run", write_config(rows, data=data, work={"order": order}), ranks=ranks)
    assert job.wait() == 0, job.output
    errors = {row["row_id"]: row["error"] for row in load_result(tmp_path / "run")}
    assert [row for row in errors if errors[row]] == [3]
    assert errors[3]["type"] == "render_timeout"
    assert "rendering took longer than data.render_timeout_s" in errors[3]["message"]
