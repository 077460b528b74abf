"""With `output.schema` the column `parsed` has the schema's types, in every format; a misfit costs no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.dataset_files import make_run

from dpgen.output.verification import verify
from dpgen.records import Completion, RowError, RowResult

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "password": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}},
        "meta": {"type": "object"},
    },
    "required": ["name", "tags"],
}
TABLE = pa.table({"prompt": ["a", "b", "c", "d"]})
TYPE = pa.struct(
    [("name", pa.string()), ("password", pa.int64()), ("tags", pa.list_(pa.string())), ("meta", pa.string())]
)
MISFIT = "does not fit output.schema: $.name is an int, not a string"


def make_completion(value: Any) -> Completion:
    text = json.dumps(value, separators=(",", ":"))
    return Completion(text, "stop", 3, parsed=text)


RESULTS = [
    RowResult(0, 3, (make_completion({"name": "é", "tags": ["x"], "meta": {"k": [1]}}),)),
    RowResult(1, 3, (make_completion({"name": 1, "tags": []}),)),
    RowResult(2, 3, (Completion('{"na', "length", 3, parse_error="no JSON"),)),
    RowResult(3, error=RowError("wrong_type", "why")),
]
VALUES = [{"name": "é", "password": None, "tags": ["x"], "meta": '{"k":[1]}'}, None, None, None]


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_parsed_has_the_types_of_the_schema(tmp_path: Path, file_format: str) -> None:
    run = make_run(tmp_path, TABLE, RESULTS, file_format, schema=SCHEMA).path
    rows = list(datasets.load_dataset(str(run / "dataset"), split="train", cache_dir=str(tmp_path / "cache")))
    assert [row["parsed"] for row in rows] == VALUES
    assert [row["parse_error"] for row in rows] == [None, MISFIT, "no JSON", None]
    assert rows[1]["generated_text"] == '{"name":1,"tags":[]}', "the text stays"
    [file] = (run / "dataset").glob("train-*")
    if file_format == "parquet":
        assert pq.read_schema(file).field("parsed").type == TYPE, "a property named like a secret keeps its type"
    else:
        assert json.loads(file.read_text().splitlines()[0])["parsed"] == VALUES[0], "an object, and no text"
    report = verify(run)
    assert (report.verdict, report.problems) == ("sound", [])


def test_a_value_that_was_changed_in_the_dataset_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path, TABLE, RESULTS, "jsonl", schema=SCHEMA).path
    [file] = (run / "dataset").glob("train-*")
    file.write_text(file.read_text().replace('"tags": ["x"]', '"tags": ["y"]'))
    assert verify(run).problems == ["the dataset's parsed differs from the journal's: 1 (0)"]


@pytest.mark.parametrize("explode", [False, True])
def test_each_sample_has_its_value(tmp_path: Path, explode: bool) -> None:
    completions = tuple(make_completion({"name": name, "tags": []}) for name in ("a", 2))
    results = [RowResult(row, 3, completions) for row in range(4)]
    run = make_run(tmp_path, TABLE, results, sampling={"n": 2}, explode=explode, schema=SCHEMA).path
    rows = pa.concat_tables([pq.read_table(file) for file in sorted((run / "dataset").glob("train-*"))]).to_pylist()
    good: dict[str, Any] = {"name": "a", "password": None, "tags": [], "meta": None}
    expected = [(good, None), (None, "does not fit output.schema: $.name is an int, not a string")]
    if explode:
        assert [(row["parsed"], row["parse_error"]) for row in rows] == expected * 4
    else:
        assert [list(zip(row["parsed"], row["parse_error"], strict=True)) for row in rows] == [expected] * 4
    assert verify(run).verdict == "sound"


def test_a_schema_without_a_type_leaves_json_text(tmp_path: Path) -> None:
    run = make_run(tmp_path, TABLE, RESULTS, schema={"type": "object"}).path
    [table] = [pq.read_table(file) for file in (run / "dataset").glob("train-*")]
    assert table["parsed"].to_pylist()[1] == '{"name":1,"tags":[]}'
    assert table["parse_error"].to_pylist()[1] is None
