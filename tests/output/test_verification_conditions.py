"""Test each condition of verify on both of its sides, on a run that is written without a job."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.dataset_files import make_run

from dpgen.config.loader import load
from dpgen.config.schema import Config, to_yaml
from dpgen.config.sections import DataConfig
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal import reader as journal_reader
from dpgen.journal.reader import JournalReader, index_journal, list_segments
from dpgen.journal.writer import JournalWriter
from dpgen.output import dataset_check
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_check import ResultLookup
from dpgen.output.export.source import open_source
from dpgen.output.result_stats import ResultStats
from dpgen.output.verification import VerificationReport, verify
from dpgen.records import Completion, RowError, RowResult

ROWS = 9  # in files of 4, 4 and 1
FAILED = 5


def make_result(row: int) -> RowResult:
    if row == FAILED:
        return RowResult(row, error=RowError("wrong_type", "x"))
    return RowResult(row, 3, (Completion(f"text {row}", "stop", 2),))


TABLE = pa.table(
    {
        "prompt": [f"row {row}" for row in range(ROWS)],
        "mixed": pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps([row]) for row in range(ROWS)])),
        "score": [row / 7 for row in range(ROWS)],
    }
)


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run in each format. Tests must not change it."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_run(folder, TABLE, [make_result(row) for row in range(ROWS)], request.param).path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Copy the finished run; its input stays where it is."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def check(run: Path, *, check_input: bool = False) -> VerificationReport:
    return verify(run, check_input=check_input)


def list_files(run: Path) -> list[Path]:
    return sorted((run / "dataset").glob("train-*"))


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(path: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Edit the rows of one file of the dataset."""
    rows = read(path)
    schema = pq.read_schema(path) if path.suffix == ".parquet" else None
    edit(rows)
    if schema is None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    columns = [
        pa.ExtensionArray.from_storage(field.type, pa.array([row[field.name] for row in rows], pa.string()))
        if isinstance(field.type, pa.BaseExtensionType)
        else pa.array([row[field.name] for row in rows], field.type)
        for field in schema
    ]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path)


def append_to_journal(run: Path, *results: RowResult) -> None:
    journal = JournalWriter(run / "journal", 2, 0)
    for result in results:
        journal.append(result)
    journal.close()


def drop_from_journal(run: Path, *rows: int) -> None:
    for path in list_segments(run / "journal"):
        path.unlink()
    append_to_journal(run, *(make_result(row) for row in range(ROWS) if row not in rows))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# ---- what is sound


def test_a_run_in_each_format_is_sound_with_and_without_its_input(run: Path) -> None:
    report = check(run, check_input=True)
    assert (report.verdict, report.problems, report.notes) == ("sound", [], [])
    assert (report.num_rows, report.num_done, report.num_failed, report.num_dataset_rows) == (ROWS, ROWS, 1, ROWS)
    assert (report.failed, report.missing, report.doubled) == ({"wrong_type": "5"}, "", "")
    assert (report.input, report.num_segments) == ("same", 1)
    assert verify(run) == report, "the input is checked unless told otherwise"
    report = check(run)
    assert (report.verdict, report.input) == ("sound", "not checked")
    assert report.notes == [
        "the input was not checked, as --no-input asks",
        "the dataset's input columns were not checked: there is no input to compare with",
    ]


@pytest.mark.parametrize(("num_rows", "num_bytes"), [(1, 1 << 30), (2, 1 << 30), (3, 1 << 30), (1000, 1), (1000, 200)])
def test_every_row_counts_however_it_is_batched(
    run: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, num_bytes: int
) -> None:
    monkeypatch.setattr(dataset_check, "BATCH_ROWS", num_rows)
    monkeypatch.setattr(dataset_check, "BATCH_BYTES", num_bytes)
    report = check(run)
    assert (report.verdict, report.num_dataset_rows) == ("sound", ROWS)
    change(list_files(run)[1], lambda rows: rows[3].update(generated_text="other"))
    assert check(run).problems == ["the dataset's generated_text differs from the journal's: 1 (7)"]


@pytest.mark.parametrize(
    ("num_rows", "num_chars", "batches"),
    [(4, 1000, [4, 2]), (6, 1000, [6]), (100, 80, [2, 2, 2]), (100, 81, [3, 3]), (100, 1, [1] * 6)],
)
def test_json_lines_are_read_in_batches_of_bounded_rows_and_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, num_chars: int, batches: list[int]
) -> None:
    monkeypatch.setattr(dataset_check, "BATCH_ROWS", num_rows)
    monkeypatch.setattr(dataset_check, "BATCH_BYTES", num_chars)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"row_id": row}).ljust(39) + "\n" for row in range(6)))
    assert [len(batch["row_id"]) for batch in dataset_check._iter_batches(path)] == batches


@pytest.mark.parametrize(
    ("num_rows", "num_bytes", "batches"), [(4, 1 << 30, [4, 2]), (100, 1 << 30, [6]), (100, 1, [1] * 6)]
)
def test_parquet_is_read_in_batches_of_bounded_rows_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, num_bytes: int, batches: list[int]
) -> None:
    monkeypatch.setattr(dataset_check, "BATCH_ROWS", num_rows)
    monkeypatch.setattr(dataset_check, "BATCH_BYTES", num_bytes)
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"row_id": range(6)}), path)
    assert [len(batch["row_id"]) for batch in dataset_check._iter_batches(path)] == batches


@pytest.mark.parametrize("num_small_rows", [1, 1000])
def test_a_batch_of_parquet_fits_the_group_with_the_largest_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_small_rows: int
) -> None:
    path = tmp_path / "train.parquet"
    texts = ["x" * 100_000 + str(row) for row in range(4)]
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), use_dictionary=False) as writer:
        writer.write_table(pa.table({"text": ["x"] * num_small_rows}))
        writer.write_table(pa.table({"text": texts}))
    monkeypatch.setattr(dataset_check, "BATCH_BYTES", 250_000)
    with pq.ParquetFile(path) as file:
        assert dataset_check.compute_batch_rows(file.metadata) == 2


def test_a_file_is_read_whole_though_the_system_returns_it_in_parts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread

    def read_a_few_bytes(fd: int, length: int, offset: int) -> bytes:
        return pread(fd, min(length, 7), offset)

    index = index_journal(run / "journal")
    monkeypatch.setattr(journal_reader.os, "pread", read_a_few_bytes)
    with JournalReader(index) as reader:
        results = [result for batch in reader.iter_batches(np.arange(ROWS)) for result in batch]
    assert results == [make_result(row) for row in range(ROWS)]
    assert index_journal(run / "journal").row.tolist() == list(range(ROWS))
    assert check(run).verdict == "sound"


def test_a_record_beyond_the_end_of_its_file_is_damaged(run: Path) -> None:
    index = index_journal(run / "journal")
    [path] = list_segments(run / "journal")
    os.truncate(path, int(index.offset[3]) + 2)
    with JournalReader(index) as reader:
        assert reader.result(2) == make_result(2)
        for position in (3, 4):
            with pytest.raises(DpgenError):
                reader.result(position)


# ---- the journal


def test_damage_is_named_with_its_segment_and_a_torn_end_is_no_problem(run: Path) -> None:
    [path] = list_segments(run / "journal")
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-9])  # without its end it was never sealed
    report = check(run)
    assert (report.verdict, report.damaged_segments) == ("sound", {})
    assert list(report.torn_segments) == [path.name] and report.torn_segments[path.name] > 0
    content[int(index_journal(run / "journal").offset[3]) + 3] ^= 1
    path.write_bytes(content)
    report = check(run)
    assert report.verdict == "not sound" and report.torn_segments == {} and report.missing == "3"
    assert "row 3" in report.damaged_segments[path.name]
    assert f"journal/{path.name} is damaged: {report.damaged_segments[path.name]}" in report.notes


@pytest.mark.parametrize(("row", "is_known"), [(-1, False), (0, True), (ROWS - 1, True), (ROWS, False)])
def test_only_rows_of_the_input_belong_into_the_journal(run: Path, row: int, is_known: bool) -> None:
    append_to_journal(run, dataclasses.replace(make_result(0), row=row))
    report = check(run)
    assert report.num_done == ROWS
    assert (report.verdict == "sound") == is_known
    assert (report.doubled == str(row)) == is_known
    assert report.problems == (
        [] if is_known else [f"the journal holds rows that the input does not have: 1 ({row})"]
    ), report.problems


@pytest.mark.parametrize("row", [-1, ROWS, ROWS + 7])
def test_a_failed_row_that_the_input_lacks_is_none_of_its_failed_rows(run: Path, row: int) -> None:
    append_to_journal(run, dataclasses.replace(make_result(FAILED), row=row))
    report = check(run)
    assert report.verdict == "not sound" and (report.num_done, report.num_failed) == (ROWS, 1)
    assert report.failed == {"wrong_type": str(FAILED)}


@pytest.mark.parametrize("row", [0, 4, ROWS - 1])
def test_a_row_that_the_journal_lacks_is_missing(run: Path, row: int) -> None:
    drop_from_journal(run, row)
    report = check(run)
    assert (report.missing, report.num_done, report.verdict) == (str(row), ROWS - 1, "not sound")
    assert report.problems == [f"the journal lacks rows, so their results can't be proven: 1 ({row})"]
    assert "_SUCCESS: only num_rows was checked" in report.notes[-1]
    edit_json(run / "_SUCCESS", lambda success: success.update(num_rows=ROWS - 1))
    assert f"_SUCCESS: num_rows={ROWS - 1}, expected {ROWS}" in check(run).problems


def test_rows_missing_in_an_unfinished_run_are_no_problem(run: Path) -> None:
    drop_from_journal(run, 3)
    (run / "_SUCCESS").unlink()
    report = check(run)
    assert (report.verdict, report.missing, report.problems, report.num_dataset_rows) == ("unfinished", "3", [], None)
    assert report.notes[-1].startswith("dataset/ was not checked: without _SUCCESS")
    shutil.rmtree(run / "dataset")
    assert not any("dataset/" in note for note in check(run).notes)


def test_results_are_looked_up_by_row_where_some_are_missing(run: Path) -> None:
    drop_from_journal(run, 0, 4, 8)
    index = index_journal(run / "journal")
    with JournalReader(index) as reader:
        found = list(ResultLookup(index, reader).get_many([8, 7, 0, 4, 3, 100]))
    assert found == [None, make_result(7), None, None, make_result(3), None]


# ---- the dataset


def swap(rows: list[dict[str, Any]], one: int, other: int) -> None:
    rows[one], rows[other] = rows[other], rows[one]


@pytest.mark.parametrize(
    ("file", "edit", "problem"),
    [
        (0, lambda rows: rows.pop(0), "the dataset lacks rows: 1 (0)"),
        (2, lambda rows: rows.pop(0), "the dataset lacks rows: 1 (8)"),
        (1, lambda rows: rows.append(rows[3]), "the dataset holds more than once rows: 1 (7)"),
        (1, lambda rows: rows.append(rows[3]), "5.jsonl is not in input order"),
        (0, lambda rows: swap(rows, 0, 1), "00000-of-00003.jsonl is not in input order"),
        (2, lambda rows: rows[0].update(row_id=0), "00002-of-00003.jsonl is not in input order"),
        (2, lambda rows: rows[0].update(row_id=-1), "it holds a row_id that the input does not have"),
        (2, lambda rows: rows[0].update(row_id=ROWS), "it holds a row_id that the input does not have"),
        (2, lambda rows: rows[0].update(row_id=ROWS + 5), "it holds a row_id that the input does not have"),
        (0, lambda rows: rows[1].update(generated_text=None), "generated_text differs from the journal's: 1 (1)"),
        (0, lambda rows: rows[1].update(finish_reason="length"), "finish_reason differs from the journal's: 1 (1)"),
        (0, lambda rows: rows[1].update(num_prompt_tokens=4), "num_prompt_tokens differs from the journal's: 1 (1)"),
        (0, lambda rows: rows[1].update(num_generated_tokens=1), "num_generated_tokens differs from the journal's: 1"),
        (1, lambda rows: rows[1].update(error=None), "error differs from the journal's: 1 (5)"),
    ],
)
def test_what_differs_in_the_dataset_is_named_with_its_rows(
    run: Path, file: int, edit: Callable[[list[dict[str, Any]]], Any], problem: str
) -> None:
    path = list_files(run)[file]
    change(path, edit)
    problem = problem.replace("5.jsonl", "00001-of-00003.jsonl").replace(".jsonl", path.suffix)
    report = check(run)
    assert any(problem in found for found in report.problems), report.problems
    assert report.verdict == "not sound"


def test_files_in_another_order_are_not_in_input_order(run: Path) -> None:
    first, second, _ = list_files(run)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert any("not in input order" in problem for problem in check(run).problems)


@pytest.mark.parametrize(
    ("change_files", "problem"),
    [
        (lambda files: files[2].unlink(), "dataset/ holds 2 files of 3"),
        (lambda files: shutil.copy(files[0], str(files[0]).replace("00000-", "00009-")), "dataset/ holds 4 files of 3"),
        (lambda files: [file.unlink() for file in files], "dataset/ holds 0 files of an unknown number"),
        (lambda files: files[0].rename(files[0].with_stem("train-0")), "dataset/ holds 3 files of an unknown number"),
        (lambda files: shutil.copy(files[0], files[0].with_stem("train-old")), "dataset/ holds 4 files of 3"),
        (
            lambda files: shutil.copy(files[0], files[0].with_stem("train--00003")),
            "dataset/ holds 4 files of an unknown number",
        ),
    ],
)
def test_the_number_of_files_is_that_in_their_names(
    run: Path, change_files: Callable[[list[Path]], Any], problem: str
) -> None:
    change_files(list_files(run))
    assert problem in check(run).problems


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("one\ntwo\nthree"), "one"), (ValueError("\n one\n"), "one"), (KeyError(), "KeyError")],
)
def test_what_keeps_a_file_from_being_read_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(path: Path) -> Any:
        raise error

    monkeypatch.setattr(dataset_check, "_iter_batches", fail)
    names = [path.name for path in list_files(run)]
    assert check(run).problems[:3] == [f"dataset/{name} can't be read: {reason}" for name in names]


@pytest.mark.parametrize("made", ["jsonl"], indirect=True)
@pytest.mark.parametrize("row", [0, 1, -1])
@pytest.mark.parametrize("line", [{"extra": 1}, {"prompt": None}, {}, ["prompt"], "prompt", 1, None])
def test_lines_of_one_file_are_objects_with_the_same_columns(run: Path, row: int, line: Any) -> None:
    path = list_files(run)[0]
    change(path, lambda rows: rows.__setitem__(row, {**rows[row], **line} if line == {"extra": 1} else line))
    assert f"dataset/{path.name} can't be read: its lines are not objects with the same columns" in check(run).problems


def test_a_dataset_that_is_a_file_or_gone_lacks_all_rows(run: Path) -> None:
    shutil.rmtree(run / "dataset")
    assert f"the dataset lacks rows: {ROWS} (0-{ROWS - 1})" in check(run).problems
    (run / "dataset").write_text("x")
    assert f"the dataset lacks rows: {ROWS} (0-{ROWS - 1})" in check(run).problems


@pytest.mark.parametrize(
    ("edit", "column"),
    [
        (lambda row: row.update(prompt="other"), "prompt"),
        (lambda row: row.update(score=None), "score"),
        (lambda row: row.update(mixed="[6]" if isinstance(row["mixed"], str) else [6]), "mixed"),
    ],
)
def test_a_column_that_differs_from_the_input_is_named(
    run: Path, edit: Callable[[dict[str, Any]], Any], column: str
) -> None:
    change(list_files(run)[1], lambda rows: edit(rows[0]))
    assert check(run, check_input=True).problems == [f"the dataset's {column} differs from the input's: 1 (4)"]
    assert check(run).verdict == "sound", "without the input, its columns are not compared"


def test_json_text_in_place_of_a_value_differs_unless_an_older_run_wrote_it(run: Path) -> None:
    def write_as_text(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["mixed"] = json.dumps(row["mixed"])

    if list_files(run)[0].suffix == ".parquet":
        pytest.skip("parquet holds the text")
    for path in list_files(run):
        change(path, write_as_text)
    assert check(run, check_input=True).problems == [f"the dataset's mixed differs from the input's: {ROWS} (0-8)"]
    edit_json(run / "_SUCCESS", lambda success: success.pop("jsonl_encoding"))
    assert check(run, check_input=True).verdict == "sound"
    edit_json(run / "_SUCCESS", lambda success: success.update(jsonl_encoding=3))
    assert any("_SUCCESS: jsonl_encoding=3 is unknown" in problem for problem in check(run).problems)


# ---- run.json and _SUCCESS


def test_rows_of_settings_that_were_replaced_are_noted(run: Path) -> None:
    def replace_settings(metadata: dict[str, Any]) -> None:
        before = {**metadata["identity"], "sampling": {"max_tokens": 5}, "input": {"num_rows": 2}}
        metadata["earlier_identities"] = {"2": before, "3": {**before, "model": "other"}}

    edit_json(run / "run.json", replace_settings)
    report = check(run, check_input=True)
    assert (report.verdict, report.notes) == (
        "sound",
        [
            "rows of attempt 1, which ran with other settings (sampling.max_tokens: 5 → null), were kept by "
            f"run.resume=force: {ROWS} (0-8)"
        ],
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "there is no run.json, so this is no run directory"),
        ('{"identity": 3}', "run.json describes no input, so no run wrote it"),
        ('{"identity": {}}', "run.json describes no input, so no run wrote it"),
        ('{"identity": {"input": {"num_rows": "9"}}}', "run.json describes no input, so no run wrote it"),
        ("garbage", "run.json can't be read"),
    ],
)
def test_without_its_identity_a_run_is_not_sound_and_says_what_was_not_checked(
    run: Path, content: str, problem: str
) -> None:
    (run / "run.json").write_text(content)
    report = check(run, check_input=True)
    assert (report.verdict, report.num_rows, report.num_dataset_rows) == ("not sound", None, None)
    assert len(report.problems) == 1 and problem in report.problems[0]
    assert report.notes == ["run.json is needed to check the input, the dataset, and which rows are missing: none was"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_rows", 8), ("num_errors", 0), ("errors", {}), ("num_generated_tokens", 1), ("hash", "0" * 32)],
)
def test_each_field_of_success_is_compared(run: Path, name: str, value: Any) -> None:
    edit_json(run / "_SUCCESS", lambda success: success.update({name: value}))
    [problem] = check(run).problems
    assert problem.startswith(f"_SUCCESS: {name}={value!r}, expected ")
    edit_json(run / "_SUCCESS", lambda success: success.pop(name))
    [problem] = check(run).problems
    assert problem == f"_SUCCESS can't be read: KeyError: {name!r}"


def test_a_success_file_without_a_version_is_of_version_1_and_unknown_versions_prove_nothing(run: Path) -> None:
    stats = ResultStats(1)
    for row in range(ROWS):
        stats.add(make_result(row))
    edit_json(run / "_SUCCESS", lambda success: success.update(stats.to_dict()))
    assert check(run).verdict == "sound"
    edit_json(run / "_SUCCESS", lambda success: success.pop("hash_version"))
    assert check(run).verdict == "sound"
    for version in (0, 3, 1.0, True, None):
        edit_json(run / "_SUCCESS", partial(dict.update, hash_version=version))
        [problem] = check(run).problems
        assert problem.startswith(f"_SUCCESS: hash_version={json.dumps(version)} is unknown, ")


def test_the_hash_is_not_compared_where_the_dataset_is_incomplete(run: Path) -> None:
    list_files(run)[2].unlink()
    report = check(run)
    assert not any("_SUCCESS" in problem for problem in report.problems)
    assert report.notes[-1].startswith("_SUCCESS: only num_rows was checked")


def test_a_run_that_keeps_no_column_of_its_input_is_sound(tmp_path: Path) -> None:
    run = make_run(tmp_path, TABLE, [make_result(row) for row in range(ROWS)], data={"columns": []}).path
    report = check(run, check_input=True)
    assert (report.verdict, report.problems, report.input) == ("sound", [], "same")


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ({}, DatasetFormat(has_samples=False, token_ids=False, file_format="parquet", kept_columns=None)),
        (
            {"sampling": {"n": 1}},
            DatasetFormat(has_samples=False, token_ids=False, file_format="parquet", kept_columns=None),
        ),
        (
            {"sampling": {"n": 2}},
            DatasetFormat(has_samples=True, token_ids=False, file_format="parquet", kept_columns=None),
        ),
        (
            {"sampling": {"from_columns": {"n": "num"}}},
            DatasetFormat(has_samples=True, token_ids=False, file_format="parquet", kept_columns=None),
        ),
        (
            {"sampling": {"from_columns": {"seed": "n"}}},
            DatasetFormat(has_samples=False, token_ids=False, file_format="parquet", kept_columns=None),
        ),
        (
            {"output": {"token_ids": True}},
            DatasetFormat(has_samples=False, token_ids=True, file_format="parquet", kept_columns=None),
        ),
        (
            {"output": {"format": "jsonl"}, "columns": ["a"]},
            DatasetFormat(has_samples=False, token_ids=False, file_format="jsonl", kept_columns=["a"]),
        ),
    ],
)
def test_the_format_of_a_dataset_follows_from_the_identity(identity: dict[str, Any], expected: DatasetFormat) -> None:
    assert DatasetFormat.from_identity(identity, 2) == expected


# ---- the input


def test_an_input_that_changed_or_is_gone_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, TABLE, [make_result(row) for row in range(ROWS)]).path
    pq.write_table(TABLE.slice(0, 8), tmp_path / "rows.parquet")
    report = check(run, check_input=True)
    assert report.input == "differs" and report.verdict == "not sound"
    [problem] = report.problems
    assert problem.startswith("the input has changed since the run: input.content")
    assert any("the dataset's input columns were not checked" in note for note in report.notes)
    (tmp_path / "rows.parquet").unlink()
    report = check(run, check_input=True)
    assert (report.input, report.verdict) == ("not checked", "sound")
    assert report.notes[0].startswith("the input was not checked: data.path: no such file")


@pytest.mark.parametrize(("rows_then", "verdict"), [(2, "sound"), (3, "not sound")])
def test_an_input_with_a_column_that_only_older_versions_read_is_not_called_changed(
    tmp_path: Path, rows_then: int, verdict: str
) -> None:
    for number, value in enumerate((Decimal("1.50"), 2.5)):
        pq.write_table(pa.table({"q": [str(number)], "c": [value]}), tmp_path / f"{number}.parquet")
    data = DataConfig(path=str(tmp_path / "*.parquet"), prompt_column="q")
    run_dir = make_run(tmp_path, data, [make_result(row) for row in range(2)])
    identity = run_dir.read_metadata()["identity"]
    read_then = {**identity["input"], "num_rows": rows_then, "columns": ["q", "c"], "content": "of both columns"}
    run_dir.update_metadata(identity={**identity, "input": read_then})
    report = check(run_dir.path, check_input=True)
    if verdict == "not sound":
        assert any(problem.startswith("the input has changed") for problem in report.problems)
        return
    assert (report.verdict, report.problems, report.input) == ("sound", [], "not checked")
    assert report.notes[0] == (
        "the input was not checked: column c, which the run read, is left out: it is decimal128(3, 2) in one file and "
        "double in another"
    )
    (run_dir.path / "_SUCCESS").unlink()
    with pytest.raises(ConfigError, match=r"can't be compared with the run's: column c, .* Export it with the version"):
        open_source(run_dir, with_messages=False)


def test_an_input_that_has_grown_at_its_end_is_the_same_and_its_columns_are_still_compared(run: Path) -> None:
    config = load([str(run / "config.yaml")], [])
    grown = run.parent / "grown.parquet"
    (run / "config.yaml").write_text(to_yaml(replace_data_path(config, grown)))
    pq.write_table(pa.concat_tables([TABLE, TABLE.slice(0, 2)]), grown)
    report = check(run, check_input=True)
    assert (report.verdict, report.problems, report.input) == ("sound", [], "same")
    assert report.notes == [f"the input has grown to {ROWS + 2} rows: the first {ROWS} are this run's"]
    change(list_files(run)[1], lambda rows: rows[0].update(prompt="other"))
    assert check(run, check_input=True).problems == ["the dataset's prompt differs from the input's: 1 (4)"]
    (run / "_SUCCESS").unlink()
    assert check(run, check_input=True).verdict == "unfinished"
    pq.write_table(pa.concat_tables([TABLE.slice(0, 2), TABLE]), grown)
    report = check(run, check_input=True)
    assert (report.verdict, report.input) == ("not sound", "differs")


def replace_data_path(config: Config, path: Path) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path)))


def test_a_run_in_which_no_row_succeeded_is_noted(tmp_path: Path) -> None:
    table = TABLE.slice(0, 2)
    results = [RowResult(row, error=RowError("wrong_type", "x")) for row in range(2)]
    run = make_run(tmp_path, table, results).path
    report = check(run)
    assert (report.verdict, report.notes[-1]) == ("sound", "no row succeeded: every result is an error")
