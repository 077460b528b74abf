"""Test that with `output.explode` each sample is a row of its own, and that verify checks each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.dataset_files import make_run

from dpgen.output.verification import verify
from dpgen.records import Completion, RowError, RowResult

TABLE = pa.table({"prompt": ["a", "b", "c", "d"], "nested": [{"x": [1]}, None, {"x": []}, {"x": [4]}]})
RESULTS = [
    RowResult(0, 3, tuple(Completion(f"a{i}", "stop", i) for i in range(3))),
    RowResult(1, error=RowError("wrong_type", "why")),
    RowResult(2, 3, (Completion("c0", "length", 5),)),
    RowResult(3, 3, tuple(Completion(f"d{i}", "stop", i) for i in range(2))),
]
# row_id, sample_id, prompt, text
ROWS = [
    *[(0, i, "a", f"a{i}") for i in range(3)],
    (1, None, "b", None),
    (2, 0, "c", "c0"),
    *[(3, i, "d", f"d{i}") for i in range(2)],
]


def make_exploded(folder: Path, file_format: str = "parquet") -> Path:
    return make_run(folder, TABLE, RESULTS, file_format, sampling={"n": 3}, explode=True).path


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_each_sample_is_a_row_with_the_columns_of_its_input(tmp_path: Path, file_format: str) -> None:
    run = make_exploded(tmp_path, file_format)
    names = sorted(path.name for path in (run / "dataset").glob("train-*"))
    assert names == [f"train-0000{i}-of-00002.{file_format}" for i in range(2)], "four rows a file, counted as written"
    rows = list(datasets.load_dataset(str(run / "dataset"), split="train", cache_dir=str(tmp_path / "cache")))
    assert [(row["row_id"], row["sample_id"], row["prompt"], row["generated_text"]) for row in rows] == ROWS
    assert [row["nested"] for row in rows] == [TABLE["nested"][row[0]].as_py() for row in ROWS]
    assert [row["num_generated_tokens"] for row in rows] == [0, 1, 2, None, 5, 0, 1]
    assert rows[3]["error"] == {"type": "wrong_type", "message": "why"} and rows[0]["error"] is None
    report = verify(run)
    assert (report.verdict, report.problems, report.num_dataset_rows) == ("sound", [], 7)


def drop(rows: list[dict[str, Any]], *positions: int) -> list[dict[str, Any]]:
    return [row for position, row in enumerate(rows) if position not in positions]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda rows: drop(rows, 2), "the dataset lacks samples of rows: 1 (0)"),
        (lambda rows: drop(rows, 0, 1, 2), "the dataset lacks rows: 1 (0)"),
        (lambda rows: [*rows, rows[-1]], "the dataset holds more than once rows: 1 (3)"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "dataset/train-00000-of-00001.parquet is not in input order"),
        (
            lambda rows: [{**rows[0], "generated_text": "a1"}, *rows[1:]],
            "the dataset's generated_text differs from the",
        ),
        (lambda rows: [*rows[:6], {**rows[6], "prompt": "c"}], "the dataset's prompt differs from the input's: 1 (3)"),
        (
            lambda rows: [*rows[:6], {**rows[6], "sample_id": 2}],
            "row 3 has a sample_id that its result does not have: 2",
        ),
        (
            lambda rows: [*rows[:3], {**rows[3], "sample_id": 0}, *rows[4:]],
            "row 1 has a sample_id that its result does",
        ),
    ],
)
def test_verify_finds_a_sample_that_is_wrong(tmp_path: Path, edit: Any, problem: str) -> None:
    run = make_exploded(tmp_path)
    paths = sorted((run / "dataset").glob("train-*"))
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    for path in paths:
        path.unlink()
    changed = pa.Table.from_pylist(edit(table.to_pylist()), schema=table.schema)
    pq.write_table(changed, run / "dataset" / "train-00000-of-00001.parquet")
    report = verify(run)
    assert report.verdict == "not sound" and any(problem in line for line in report.problems), report.problems
