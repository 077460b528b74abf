"""Test the command line of `dpgen export`; tests/output/export tests what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from helpers.dataset_files import make_run

from dpgen.cli import main
from dpgen.records import Completion, RowResult

TABLE = pa.table({"prompt": ["a", "b"], "my, col": [1, 2]})
RESULTS = [RowResult(row, 1, (Completion("x", "stop", 1),)) for row in range(2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: RUN_DIR"),
        (["no/such/directory", "out"], "RUN_DIR=no/such/directory: there is no such directory"),
        (["."], "give either TARGET or --push-to-hub NAME"),
        ([".", "out", "--push-to-hub", "a"], "give either TARGET or --push-to-hub NAME"),
        ([".", "out", "--private"], "--private needs --push-to-hub NAME"),
        ([".", "out", "--fromat", "csv"], "unknown option --fromat, did you mean --format?"),
        ([".", "out", "--format", "xlsx"], "argument --format: invalid choice: 'xlsx'"),
        ([".", "out.csv", "--format", "jsonl"], ".csv is the suffix of csv, and --format is jsonl"),
        ([".", "out", "--columns", "[a"], "--columns [a: this is no JSON list of names"),
        ([".", "out"], "RUN_DIR=.: there is no run.json of a run, so this is no run directory"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "empty"
    run.mkdir()
    monkeypatch.chdir(run)
    arguments = [str(tmp_path / argument) if argument.startswith("out") else argument for argument in arguments]
    assert main(["export", *arguments]) == 2
    output, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not output


def test_the_report_says_what_was_exported_and_that_a_run_is_unfinished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, TABLE, RESULTS)
    assert main(["export", str(run.path), str(tmp_path / "out.csv"), "--columns", '["my, col"]']) == 0
    output, error = capsys.readouterr()
    assert output.startswith(f"exported 2 rows to {tmp_path}/out.csv: csv, 1 file, ") and not error
    assert (tmp_path / "out.csv").read_text() == '"my, col"\n1\n2\n'

    run.success.unlink()
    segment = next(run.journal.glob("*.journal"))
    data = segment.read_bytes()
    segment.write_bytes(data[: len(data) // 2])
    assert main(["export", str(run.path), str(tmp_path / "out.jsonl"), "--json", "--columns", "row_id,prompt"]) == 0
    output, error = capsys.readouterr()
    assert error == ("dpgen export: the run is unfinished: 1 of 2 rows have a result, and only these are exported\n")
    report = json.loads(output)
    assert (report["num_done"], report["num_input_rows"], report["columns"]) == (1, 2, ["row_id", "prompt"])
