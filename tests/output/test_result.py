"""Test that a run in which no row succeeded is no success, and says why."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from helpers.dataset_files import make_run

from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.errors import EXIT_FAILED, DpgenError
from dpgen.output.columns import DatasetFormat
from dpgen.output.result import raise_if_no_row_succeeded, write_result
from dpgen.records import Completion, RowError, RowResult

GOOD = (Completion("a", "stop", 1),)


def fail(row: int, type: str) -> RowResult:
    return RowResult(row, error=RowError(type, f"because {row}"))


def test_a_result_without_any_completion_is_written_and_the_run_fails_with_its_most_frequent_error(
    tmp_path: Path,
) -> None:
    table = pa.table({"prompt": ["a", "b", "c"]})
    results = [fail(0, "wrong_type"), fail(1, "prompt_too_long"), fail(2, "prompt_too_long")]
    run_dir = make_run(tmp_path, table, results)
    rows = load_input(DataConfig(path=str(tmp_path / "rows.parquet"), prompt_column="prompt"))
    with pytest.raises(DpgenError) as raised:
        write_result(rows, run_dir, DatasetFormat(), 100, allow_all_errors=False)
    assert raised.value.exit_status == EXIT_FAILED
    message = str(raised.value)
    assert "all 3 rows have an error, 2 of them prompt_too_long (first: row 1: prompt_too_long: because 1)" in message
    assert "run.retry_errors=true" in message and "run.allow_all_errors=true" in message
    assert "in another run.dir if the input changes" in message, "this run.dir takes no other input"
    assert run_dir.is_finished and len(list(run_dir.dataset.glob("*.parquet"))) == 1
    with pytest.raises(DpgenError, match="all 3 rows have an error, 2 of them prompt_too_long"):
        raise_if_no_row_succeeded(run_dir.read_success(), run_dir)
    write_result(rows, run_dir, DatasetFormat(), 100, allow_all_errors=True)


def test_one_completion_or_no_row_at_all_is_a_success(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, pa.table({"prompt": ["a", "b"]}), [fail(0, "wrong_type"), RowResult(1, 1, GOOD)])
    raise_if_no_row_succeeded(run_dir.read_success(), run_dir)
    raise_if_no_row_succeeded({"num_rows": 0, "errors": {}}, run_dir)
    run_dir.success.write_text("garbage")
    raise_if_no_row_succeeded(run_dir.read_success(), run_dir)  # `dpgen verify` reports the file
    run_dir.success.write_text("[]")
    assert run_dir.read_success() == {}


def test_a_single_row_that_failed_is_named(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, pa.table({"prompt": ["a"]}), [fail(0, "wrong_type")])
    with pytest.raises(DpgenError, match="no row succeeded: the only row has an error, wrong_type"):
        raise_if_no_row_succeeded(run_dir.read_success(), run_dir)
