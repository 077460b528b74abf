"""Test what each format of an export holds, as the programs that people use read it."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.batch_files import make_chat, write_batch
from helpers.dataset_files import make_run

import dpgen
from dpgen.config.program import ProgramConfig
from dpgen.config.sections import DataConfig
from dpgen.data.reading.json_types import to_python
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.run_dir import RunDir
from dpgen.logprobs import from_rows
from dpgen.output.export import formats
from dpgen.output.export.export import ExportReport, export_run, find_format
from dpgen.output.export.selection import Selection
from dpgen.output.export.stats import ExportStats
from dpgen.records import Completion, PooledKind, PooledOutput, RowError, RowResult

MOMENT = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456)
TABLE = pa.table(
    {
        "prompt": ['é"\n,\u2028\x85', "", "plain", "007"],
        "number": pa.array([2**53 + 1, None, -1, 0]),
        "score": pa.array([0.1, None, 1e300, -0.0]),
        "flag": pa.array([True, None, False, True]),
        "moment": pa.array([MOMENT, None, MOMENT, MOMENT], pa.timestamp("us")),
        "price": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("2.00"), decimal.Decimal("0.00")]),
        "tags": pa.array([["a", None], None, [], ['"']]),
        "nested": pa.array([{"x": [1]}, None, {"x": []}, {"x": None}]),
    }
)
RESULTS = [
    RowResult(0, 3, (Completion('so, "it"\nis', "stop", 4),)),
    RowResult(1, error=RowError("wrong_type", "why")),
    RowResult(2, 3, (Completion("", "length", 5),)),
    RowResult(3, 3, (Completion("007", "stop", 6),)),
]
# As `run.output.format=jsonl` writes them.
JSON_ROWS = [
    {"number": 2**53 + 1, "score": 0.1, "flag": True, "moment": str(MOMENT), "price": "1.10", "tags": ["a", None],
     "nested": {"x": [1]}},
    dict.fromkeys(("number", "score", "flag", "moment", "price", "tags", "nested")),
    {"number": -1, "score": 1e300, "flag": False, "moment": str(MOMENT), "price": "2.00", "tags": [],
     "nested": {"x": []}},
    {"number": 0, "score": -0.0, "flag": True, "moment": str(MOMENT), "price": "0.00", "tags": ['"'],
     "nested": {"x": None}},
]  # fmt: skip
EVERYTHING = Selection()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"), TABLE, RESULTS, data={"as_chat": True})


def export(run_dir: RunDir, target: Path, selection: Selection = EVERYTHING, **options: Any) -> ExportReport:
    format = find_format(str(target), options.pop("format", None))
    return export_run(run_dir, str(target), format, selection, **options)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_parquet(folder: Path) -> pa.Table:
    """Return the rows of a Parquet file, or of those of a folder."""
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    return pa.concat_tables(map(pq.read_table, files))


def load(path: Path) -> datasets.Dataset:
    return datasets.load_dataset(str(path), split="train", cache_dir=str(path.parent / "cache"))


# ---- formats


@pytest.mark.parametrize("target", ["out.parquet", "out"])
def test_parquet_holds_the_dataset_as_it_is(run_dir: RunDir, tmp_path: Path, target: str) -> None:
    report = export(run_dir, tmp_path / target)
    original = read_parquet(run_dir.dataset)
    assert read_parquet(tmp_path / target).to_pylist() == original.to_pylist()
    assert read_parquet(tmp_path / target).schema.equals(original.schema)
    assert pd.read_parquet(tmp_path / target)["generated_text"].tolist()[2:] == ["", "007"]
    assert pl.read_parquet(tmp_path / target)["generated_text"].to_list()[2:] == ["", "007"]
    assert (report.num_exported, report.num_errors, report.num_files) == (4, 1, 1)
    if target == "out":
        assert load(tmp_path / target).features == load(run_dir.dataset).features
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-00000-of-00001.parquet"]
    assert {path.name for path in tmp_path.iterdir()} <= {target, "cache"}, "nothing temporary stays"


def test_the_card_names_the_checks_and_what_they_rejected(run_dir: RunDir, tmp_path: Path) -> None:
    identity = {
        **run_dir.read_metadata()["identity"],
        "check": {"regex": "^[0-9]", "function": None, "max_attempts": 3},
    }
    ranks = [{"num_retries": {"regex": 3}, "num_rejected_tokens": 20}, {"num_retries": {"regex": 4}}]
    export(run_dir, tmp_path / "unchecked", for_hub=True)
    assert "## Checks" not in (tmp_path / "unchecked" / "README.md").read_text()
    run_dir.update_metadata(identity=identity, manifests=ranks)
    export(run_dir, tmp_path / "out", for_hub=True)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("## Checks", "max_attempts: 3", "`regex` 7", "rejected completions there: 20", "to the last: none"):
        assert text in card
    assert "function" not in card.split("## Checks")[1].split("##")[0]


def test_the_card_names_the_keys_whose_values_were_replaced_and_not_the_values(run_dir: RunDir, tmp_path: Path) -> None:
    before = {**run_dir.read_metadata()["identity"], "model": "/home/ada/model"}
    run_dir.update_metadata(attempt=2, earlier_identities={"2": before})
    export(run_dir, tmp_path / "out", for_hub=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "may have been generated with other values of `model`." in card and "ada" not in card


def test_row_groups_and_shards_are_cut_by_bytes(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_parquet(run_dir.dataset)
    monkeypatch.setattr(formats, "_ROW_GROUP_BYTES", rows.nbytes // 3)
    with formats.open_writer("parquet", tmp_path / "one.parquet", rows.schema, []) as writer:
        for start in range(4):
            writer.write(rows.slice(start, 1))
    metadata = pq.read_metadata(tmp_path / "one.parquet")
    assert metadata.num_rows == 4 and 1 < metadata.num_row_groups <= 4
    assert metadata.row_group(0).column(0).has_offset_index, "the Hub's viewer reads single pages"
    monkeypatch.setattr(formats, "_SHARD_BYTES", rows.nbytes // 2)
    (tmp_path / "shards").mkdir()
    with formats.open_writer("parquet", tmp_path / "shards", rows.schema, []) as writer:
        for start in range(4):
            writer.write(rows.slice(start, 1))
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert len(names) > 1 and names[0] == f"train-00000-of-{len(names):05d}.parquet"
    assert read_parquet(tmp_path / "shards").to_pylist() == rows.to_pylist()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines_hold_every_value(run_dir: RunDir, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.jsonl{suffix}"
    export(run_dir, path)
    data = path.read_bytes()
    lines = (gzip.decompress(data) if suffix else data).decode("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    for row, text, expected in zip(rows, TABLE["prompt"].to_pylist(), JSON_ROWS, strict=True):
        assert {name: row[name] for name in expected} == expected and row["prompt"] == text
    assert [row["generated_text"] for row in rows] == ['so, "it"\nis', None, "", "007"]
    assert rows[1]["error"] == {"type": "wrong_type", "message": "why"} and rows[0]["error"] is None


def test_csv_holds_lists_and_structs_as_json_and_tells_a_null_from_an_empty_text(
    run_dir: RunDir, tmp_path: Path
) -> None:
    path = tmp_path / "out.csv"
    export(run_dir, path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, text, expected in zip(rows, TABLE["prompt"].to_pylist(), JSON_ROWS, strict=True):
        assert row["prompt"] == text
        for name in ("tags", "nested"):
            assert (json.loads(row[name]) if row[name] else None) == expected[name]
        assert row["moment"] == (expected["moment"] or "") and row["price"] == (expected["price"] or "")
    frame = pd.read_csv(path, dtype={"number": "Int64", "generated_text": "str"}, keep_default_na=False, na_values={
        "number": [""], "score": [""], "flag": [""]})  # fmt: skip
    assert frame["number"].tolist() == [2**53 + 1, pd.NA, -1, 0]
    assert [None if np.isnan(value) else value for value in frame["score"]] == [0.1, None, 1e300, -0.0]
    assert frame["generated_text"].tolist()[3] == "007"
    third, second = path.read_text(encoding="utf-8").split("\n")[-3:-1][0], rows[1]
    assert second["generated_text"] == "" and ',"","length",' in third, "an empty text is in quotes, a null is not"
    assert json.loads(second["error"]) == {"type": "wrong_type", "message": "why"}


def test_a_folder_of_save_to_disk_loads(run_dir: RunDir, tmp_path: Path) -> None:
    report = export(run_dir, tmp_path / "saved", format="save_to_disk")
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    assert saved.features == load(run_dir.dataset).features
    assert list(saved) == read_parquet(run_dir.dataset).to_pylist()
    assert report.num_files == 1 and report.num_bytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "nothing temporary stays"


def test_conversations_end_with_the_model_s_turn(run_dir: RunDir, tmp_path: Path) -> None:
    report = export(run_dir, tmp_path / "sft.jsonl", Selection(["number"], ["number=id"]), format="messages")
    assert (report.num_exported, report.num_left_out) == (3, 1), "a row with an error has no answer"
    assert read_lines(tmp_path / "sft.jsonl")[1:] == [
        {"messages": [{"role": "user", "content": "plain"}, {"role": "assistant", "content": ""}], "id": -1},
        {"messages": [{"role": "user", "content": "007"}, {"role": "assistant", "content": "007"}], "id": 0},
    ]


def test_each_sample_is_a_conversation(tmp_path: Path) -> None:
    results = [RowResult(0, 1, (Completion("a", "stop", 1), Completion("b", "stop", 1)))]
    run = make_run(tmp_path, pa.table({"q": ["x"]}), results, data={"as_chat": True}, sampling={"n": 2})
    export(run, tmp_path / "sft.jsonl", format="messages")
    answers = [row["messages"][-1]["content"] for row in read_lines(tmp_path / "sft.jsonl")]
    assert answers == ["a", "b"]


def test_a_run_of_texts_has_no_conversations(tmp_path: Path) -> None:
    run = make_run(tmp_path, pa.table({"q": ["x"]}), [RowResult(0, 1, (Completion("a", "stop", 1),))])
    with pytest.raises(ConfigError, match="needs a chat, and this run's prompts are texts"):
        export(run, tmp_path / "sft.jsonl", format="messages")


def test_a_run_without_answers_has_no_conversations(tmp_path: Path) -> None:
    vector, answer = PooledOutput(np.zeros((1, 2), np.float32)), Completion("{}", "stop", 1, parsed="{}")
    runs: dict[str, tuple[RowResult, dict[str, Any]]] = {
        **{task: (RowResult(0, 1, pooled=vector), {"task": task}) for task in ("embed", "classify", "reward")},
        "program.function": (RowResult(0, 1, (answer,)), {"program": ProgramConfig("a:b"), "data": {}}),
    }
    for name, (result, sections) in runs.items():
        sections.setdefault("data", {"as_chat": True})
        run = make_run(tmp_path / name, pa.table({"q": ["x"]}), [result], **sections)
        with pytest.raises(ConfigError, match=f"needs the model's answers to chats, and .*{name}.*: choose another"):
            export(run, tmp_path / "sft.jsonl", format="messages")
        for target in ("rows.jsonl", "rows.csv", "rows"):
            assert export(run, tmp_path / name / target).num_exported == 1


@pytest.mark.parametrize(
    ("column", "sections"),
    [
        ("embedding", {"task": "embed", "pooled": PooledKind(3)}),
        ("embedding", {"task": "embed", "pooled": PooledKind(3), "embedding_dtype": "float16"}),
        ("embedding", {"task": "embed", "pooled": PooledKind(3), "embedding_dtype": "int8"}),
        ("embedding", {"task": "embed", "pooled": PooledKind(3), "embedding_dtype": "binary"}),
        ("probs", {"task": "classify", "pooled": PooledKind(3, ("no", "yes, sir", "maybe"))}),
        ("label", {"task": "classify", "pooled": PooledKind(3, ("no", "yes, sir", "maybe"))}),
        ("reward", {"task": "reward", "pooled": PooledKind(1)}),
        ("reward", {"task": "reward", "pooled": PooledKind(3)}),
        ("reward", {"task": "reward", "pooled": PooledKind(1), "reward_per": "token"}),
    ],
)
@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_what_a_pooling_model_returns_is_the_same_in_every_format(
    tmp_path: Path, column: str, sections: dict[str, Any], file_format: str
) -> None:
    vector = PooledOutput(np.array([[0.1, -0.7, 0.3]], np.float32))
    results = [RowResult(0, 3, pooled=vector), RowResult(1, error=RowError("wrong_type", "why"))]
    run = make_run(tmp_path / "made", pa.table({"q": ["x", "y"]}), results, file_format, **sections)
    for target in ("rows.parquet", "rows.jsonl", "rows.csv", "rows"):
        export(run, tmp_path / target)
    export(run, tmp_path / "saved", format="save_to_disk")
    value, error = read_lines(tmp_path / "rows.jsonl")
    assert value["error"] is None and error[column] is None and error["error"]["type"] == "wrong_type"
    if column != "label" and sections.get("embedding_dtype", "float32") == "float32":
        assert value[column] in (0.1, [0.1], [[0.1, -0.7, 0.3]], [0.1, -0.7, 0.3], list_probs(0.1, -0.7, 0.3))
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert second[column] == "" and (first[column] == value[column] or json.loads(first[column]) == value[column])
    tables = [read_parquet(tmp_path / name) for name in ("rows.parquet", "rows")]
    for rows in (*(table.to_pylist() for table in tables), list(datasets.load_from_disk(str(tmp_path / "saved")))):
        assert rows[1][column] is None
        found = json.loads(json.dumps(rows[0][column]), parse_float=lambda text: round(float(text), 6))
        assert found == json.loads(json.dumps(value[column]), parse_float=lambda text: round(float(text), 6))


def list_probs(*values: float) -> dict[str, float]:
    return dict(zip(("no", "yes, sir", "maybe"), values, strict=True))


def test_a_run_of_response_files_is_exported_as_rows(tmp_path: Path) -> None:
    lines = [make_chat("a", "x"), "no JSON"]
    data = DataConfig(path=str(write_batch(tmp_path / "in.jsonl", lines)), format="openai_batch")
    results = [RowResult(0, 1, (Completion("an answer", "stop", 1),)), RowResult(1, error=RowError("bad_request", "y"))]
    run = make_run(tmp_path, data, results, "openai_batch")
    export(run, tmp_path / "rows.jsonl", Selection(["custom_id", "generated_text", "error"]))
    assert read_lines(tmp_path / "rows.jsonl") == [
        {"custom_id": "a", "generated_text": ["an answer"], "error": None},
        {"custom_id": None, "generated_text": None, "error": {"type": "bad_request", "message": "y"}},
    ]
    with pytest.raises(ConfigError, match="the rows of a batch file are requests: choose another format"):
        export(run, tmp_path / "sft.jsonl", format="messages")


def test_a_column_of_conversations_is_exported_from_the_dataset(tmp_path: Path) -> None:
    run = make_run(tmp_path, TABLE, RESULTS, data={"as_chat": True, "columns": ["number"]}, messages=True)
    (tmp_path / "rows.parquet").unlink()
    export(run, tmp_path / "sft.jsonl", format="messages")
    assert len(read_lines(tmp_path / "sft.jsonl")) == 3, "the input is not needed"


def test_a_result_in_json_lines_is_exported_with_its_types(tmp_path: Path) -> None:
    run = make_run(tmp_path, TABLE, RESULTS, "jsonl")
    export(run, tmp_path / "out.parquet")
    rows = read_parquet(tmp_path / "out.parquet")
    assert rows["moment"].to_pylist() == TABLE["moment"].to_pylist()
    assert rows["generated_text"].to_pylist() == ['so, "it"\nis', None, "", "007"]


# What `datasets` reads as something else out of JSON lines: it knows dates, and cuts decimals off beside mixed values.
ODD_ROWS: list[dict[str, Any]] = [
    {"q": "2024-05-01T07:08:09Z", "day": "2024-05-01", "x": 2, "f": 1 / 7, "n": 2**64 - 1},
    {"q": "2024-05-02T07:08:09Z", "day": "2024-05-02", "x": "2", "f": 1e-12, "n": 5},
    {"q": "2024-05-03T07:08:09Z", "day": "2024-05-03", "x": "true", "f": -0.0, "n": 0},
    {"q": "2024-05-04T07:08:09Z", "day": None, "x": {"a": None}, "f": 5e-324, "n": None},
    {"q": "\ud83d\ude00\u2028\r\n", "day": "", "x": ["2024-05-04", {}], "f": None, "n": 2**63},
]


def make_odd_run(folder: Path, rows: list[dict[str, Any]]) -> RunDir:
    folder.mkdir()
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = [RowResult(row, 1, (Completion("2024-05-06T07:08:09", "stop", 1),)) for row in range(len(rows))]
    return make_run(folder, DataConfig(path=str(folder / "in.jsonl"), prompt_column="q"), results, "jsonl")


def test_a_result_in_json_lines_is_exported_and_loaded_as_its_lines_say(tmp_path: Path) -> None:
    run = make_odd_run(tmp_path / "runs[1]", ODD_ROWS)  # brackets are a pattern to `datasets`
    lines = "".join(path.read_text() for path in sorted(run.dataset.glob("train-*")))
    expected = [json.loads(line) for line in lines.split("\n") if line]
    assert [expected[0]["q"], expected[0]["generated_text"]] == ["2024-05-01T07:08:09Z", "2024-05-06T07:08:09"]
    export(run, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == lines
    export(run, tmp_path / "out.parquet")
    exported = pq.read_table(tmp_path / "out.parquet")
    columns = [to_python(exported[name]) for name in exported.column_names]
    assert repr([dict(zip(exported.column_names, row, strict=True)) for row in zip(*columns, strict=True)]) == repr(
        expected
    )
    for _ in range(2):  # the second time from the cache
        assert repr(list(dpgen.load_result(run.path))) == repr(expected)


def test_values_that_an_older_run_wrote_as_json_text_are_read_as_values(tmp_path: Path) -> None:
    run = make_odd_run(tmp_path / "run", ODD_ROWS)
    values = [row["x"] for row in ODD_ROWS]
    for path in run.dataset.glob("train-*"):
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        path.write_text("".join(json.dumps({**row, "x": json.dumps(row["x"])}) + "\n" for row in rows))
    success = json.loads(run.success.read_text())
    assert success.pop("jsonl_encoding") == 2
    assert dpgen.load_result(run.path)["x"] == [json.dumps(value) for value in values], "as its lines say by now"
    run.success.write_text(json.dumps(success))
    assert dpgen.load_result(run.path)["x"] == values
    export(run, tmp_path / "out.jsonl")
    assert [json.loads(line)["x"] for line in (tmp_path / "out.jsonl").read_text().split("\n") if line] == values


def test_a_number_of_any_size_is_exported_from_json_lines(tmp_path: Path) -> None:
    run = make_odd_run(tmp_path / "run", [{"q": "a", "x": 10**30}, {"q": "b", "x": "s"}])
    export(run, tmp_path / "out.jsonl")
    assert [row["x"] for row in read_lines(tmp_path / "out.jsonl")] == [10**30, "s"]


def test_a_damaged_line_of_a_result_is_named(tmp_path: Path) -> None:
    run = make_odd_run(tmp_path / "run", ODD_ROWS)
    [file] = run.dataset.glob("train-00001*")
    file.write_text('{"q": "cut')
    with pytest.raises(DpgenError, match=r"train-00001-of-00002.jsonl, lines 1 to 1 can't be read.*dpgen verify"):
        export(run, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv", "out.parquet"])
def test_log_probabilities_have_no_more_digits_than_they_need(tmp_path: Path, target: str) -> None:
    logprobs = from_rows([5, 6], np.array([[5], [6]]), np.array([[-0.1], [-0.25]], np.float32), 0)
    results = [RowResult(0, 1, (Completion("a", "stop", 2, logprobs=logprobs),))]
    run = make_run(tmp_path, pa.table({"q": ["x"]}), results, sampling={"logprobs": 0})
    export(run, tmp_path / target, Selection(["token_logprobs"], ["token_logprobs=p"]))
    if target.endswith("parquet"):
        assert pq.read_schema(tmp_path / target).field("p").type == pa.list_(pa.float32())
        assert "BYTE_STREAM_SPLIT" in pq.read_metadata(tmp_path / target).row_group(0).column(0).encodings
    else:
        assert "[-0.1, -0.25]" in (tmp_path / target).read_text()


# ---- rows and columns


def test_columns_are_chosen_ordered_and_renamed(run_dir: RunDir, tmp_path: Path) -> None:
    selection = Selection(["generated_text", "prompt"], ["generated_text=answer"], only_successful=True)
    report = export(run_dir, tmp_path / "out", selection)
    rows = load(tmp_path / "out")
    assert rows.column_names == ["answer", "prompt"] == report.columns
    assert rows["answer"] == ['so, "it"\nis', "", "007"]
    assert (report.num_exported, report.num_left_out, report.num_errors) == (3, 1, 0)


@pytest.mark.parametrize(
    ("columns", "renames", "message"),
    [
        (["promt"], [], "--columns: there is no column 'promt'; did you mean 'prompt'?"),
        (["prompt", "prompt"], [], "--columns: 'prompt' is there twice"),
        ([], [], "--columns: name at least one column"),
        (None, ["prompt"], "--rename prompt: write OLD=NEW"),
        (None, ["promt=x"], "--rename promt=x: 'promt' is no column of the dataset; did you mean 'prompt'?"),
        (["flag"], ["prompt=x"], "--rename prompt=x: 'prompt' is not among --columns"),
        (None, ["prompt="], "--rename prompt=: the new name is empty"),
        (None, ["prompt=flag"], "--rename: two columns would be called 'flag'"),
    ],
)
def test_a_wrong_choice_of_columns_is_refused_before_anything_is_written(
    run_dir: RunDir, tmp_path: Path, columns: list[str] | None, renames: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        export(run_dir, tmp_path / "out.csv", Selection(columns, renames))
    assert message in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_name_with_an_equals_sign_can_be_renamed() -> None:
    assert Selection(None, ["a=b=c"]).resolve(["a=b", "d"]) == {"a=b": "c", "d": "d"}


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([b"\xff", None]), "can't hold the column 'x': it holds bytes"),
        (pa.array([[float("nan")], None]), "the column 'x' holds NaN or an infinity, which JSON can't"),
    ],
    ids=["bytes", "nan"],
)
def test_what_json_can_t_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, target: str, values: pa.Array, message: str
) -> None:
    results = [RowResult(row, 1, (Completion("a", "stop", 1),)) for row in range(2)]
    run = make_run(tmp_path / "run", pa.table({"q": ["a", "b"], "x": values}), results)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / "out" / target)
    assert not any((tmp_path / "out").iterdir())
    export(run, tmp_path / "out" / target, Selection(["q", "generated_text"]))


@pytest.mark.parametrize("target", ["rows.parquet", "rows"])
def test_what_parquet_can_t_hold_is_refused_and_leaves_nothing(tmp_path: Path, target: str) -> None:
    """A run in JSON lines holds objects without keys."""
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), pa.schema([("q", pa.string()), ("x", pa.struct([]))])) as file:
        file.write_table(pa.table({"q": ["a"], "x": pa.array([{}], pa.struct([]))}))
    data = DataConfig(path=str(tmp_path / "rows.arrow"), prompt_column="q")
    run = make_run(tmp_path / "run", data, [RowResult(0, 1, (Completion("a", "stop", 1),))], "jsonl")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ConfigError, match=r"can't hold the column 'x': .*Export as jsonl, or leave it out: --columns q"
    ):
        export(run, tmp_path / "out" / target)
    assert not any((tmp_path / "out").iterdir())
    export(run, tmp_path / "out" / target, Selection(["q", "generated_text"]))


# ---- runs that are not finished


def make_unfinished(folder: Path, num_rows: int, cut_bytes: int = 0) -> RunDir:
    """Make a run whose journal is cut, and return it."""
    table = pa.table({"prompt": [f"row {row}" for row in range(num_rows)]})
    results = [RowResult(row, 1, (Completion(f"answer {row}", "stop", 1),)) for row in reversed(range(num_rows))]
    run = make_run(folder, table, results, data={"as_chat": True})
    run.success.unlink()
    for path in (*run.dataset.iterdir(), run.dataset):
        path.rmdir() if path.is_dir() else path.unlink()
    [segment] = run.journal.glob("*.journal")
    data = segment.read_bytes()
    segment.write_bytes(data[: len(data) // 2 - cut_bytes])
    return run


@pytest.mark.parametrize("format", ["jsonl", "messages"])
def test_of_an_unfinished_run_the_rows_that_are_there_are_exported_in_input_order(tmp_path: Path, format: str) -> None:
    run = make_unfinished(tmp_path, 60)
    report = export(run, tmp_path / "out.jsonl", format=format)
    assert 0 < report.num_done < 60 == report.num_input_rows
    rows = read_lines(tmp_path / "out.jsonl")
    assert len(rows) == report.num_done == report.num_exported
    expected = range(60 - report.num_done, 60)
    if format == "jsonl":
        assert [(row["row_id"], row["prompt"], row["generated_text"]) for row in rows] == [
            (row, f"row {row}", f"answer {row}") for row in expected
        ]
    else:
        contents = [tuple(message["content"] for message in row["messages"]) for row in rows]
        assert contents == [(f"row {row}", f"answer {row}") for row in expected]


def test_a_changed_input_is_refused_and_a_grown_one_is_not(tmp_path: Path) -> None:
    run = make_unfinished(tmp_path, 40)
    rows = [f"row {row}" for row in range(40)]
    pq.write_table(pa.table({"prompt": [*rows, "one more"]}), tmp_path / "rows.parquet")
    assert export(run, tmp_path / "out.jsonl").num_input_rows == 40
    pq.write_table(pa.table({"prompt": ["changed", *rows[1:]]}), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"the input has changed since the run.*input\.content"):
        export(run, tmp_path / "changed.jsonl")


def test_a_run_without_a_result_has_nothing_to_export(tmp_path: Path) -> None:
    run = make_unfinished(tmp_path, 3)
    for segment in run.journal.glob("*.journal"):
        segment.unlink()
    with pytest.raises(DpgenError, match="nothing to export: none of the run's 3 rows has a result"):
        export(run, tmp_path / "out.jsonl")


def test_a_folder_that_is_no_run_and_a_dataset_that_lacks_files_are_refused(run_dir: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this is no run directory"):
        export(RunDir(str(tmp_path / "none")), tmp_path / "out.jsonl")
    run = make_run(tmp_path / "run", TABLE, RESULTS)
    next(run.dataset.glob("train-*")).unlink()
    with pytest.raises(DpgenError, match="dataset/ holds 0 files"):
        export(run, tmp_path / "out.jsonl")


# ---- targets


def test_what_is_there_is_replaced_only_if_asked_and_only_if_an_export_wrote_it(
    run_dir: RunDir, tmp_path: Path
) -> None:
    for target, format in (("out.jsonl", None), ("out", None), ("saved", "save_to_disk")):
        export(run_dir, tmp_path / target, format=format)
        with pytest.raises(ConfigError, match="is there already: choose another name, or replace it with --overwrite"):
            export(run_dir, tmp_path / target, format=format)
        export(run_dir, tmp_path / target, format=format, overwrite=True)
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds what no such export wrote \(mine.txt\)"):
        export(run_dir, tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match="is a folder, and this export is a file"):
        export(run_dir, tmp_path / "out", format="csv", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.parametrize("place", ["", "dataset", "new.jsonl", ".."])
def test_the_run_directory_is_no_target(run_dir: RunDir, place: str) -> None:
    with pytest.raises(ConfigError, match="run directory"):
        export(run_dir, run_dir.path / place, format="parquet", overwrite=True) if place != "new.jsonl" else export(
            run_dir, run_dir.path / place
        )
    assert run_dir.is_finished and any(run_dir.dataset.iterdir())


def test_an_export_that_fails_leaves_the_earlier_one(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run_dir, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()

    def fail(row: dict[str, Any]) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "format_json_line", fail)
    with pytest.raises(DpgenError, match=r"out.jsonl can't be written: No space left on device"):
        export(run_dir, tmp_path / "out.jsonl", overwrite=True)
    assert (tmp_path / "out.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("target", "format", "found"),
    [
        ("a.jsonl", None, "jsonl"),
        ("a.ndjson.zst", None, "jsonl"),
        ("a.csv", None, "csv"),
        ("folder", None, "parquet"),
        ("v1.2", None, "parquet"),
        ("A.CSV.GZ", None, "csv"),
        ("a.json", "jsonl", "jsonl"),
        ("a.json", None, r"but .parquet, .jsonl, .ndjson, .csv \(.jsonl, .ndjson, .csv also with .gz, "),
        ("a.jsonl.xz", None, "no file .xz is written"),
        ("a.jsonl", "messages", "messages"),
        ("a.csv", "jsonl", "suffix of csv, and --format is jsonl"),
        ("a.parquet.gz", None, "leave .gz out"),
        ("a", "xlsx", "--format xlsx: unknown"),
        ("s3://bucket/a.jsonl", None, "must be a path; a run uploads its own result to output.to"),
    ],
)
def test_the_format_follows_from_the_suffix(target: str, format: str | None, found: str) -> None:
    if found in formats.FORMATS:
        assert find_format(target, format) == found
    else:
        with pytest.raises(ConfigError, match=found):
            find_format(target, format)


@pytest.mark.parametrize("target", ["out.parquet", "out.csv", "saved"])
def test_the_memory_of_an_export_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    num_rows, sizes = 16_000, []
    run = make_run(tmp_path, pa.table({"prompt": ["x"]}), [RowResult(0, 1, ())])
    [file] = run.dataset.glob("train-*")
    row = pq.read_table(file).set_column(0, "prompt", pa.array([os.urandom(1000).hex()]))
    with pq.ParquetWriter(file, row.schema) as writer:
        for _ in range(num_rows // 1000):
            writer.write_table(pa.concat_tables([row] * 1000))
    before, add = pa.total_allocated_bytes(), ExportStats.add

    def add_and_measure(stats: ExportStats, table: pa.Table) -> None:
        add(stats, table)
        sizes.append(pa.total_allocated_bytes() - before)

    monkeypatch.setattr(formats, "_ROW_GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(ExportStats, "add", add_and_measure)
    tracemalloc.start()
    try:
        export(run, tmp_path / target, format="save_to_disk" if target == "saved" else None)
        _, python_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(sizes) >= 8, "the rows came in batches"
    assert max(sizes) < num_rows * 2000 / 2 and python_peak < num_rows * 2000 / 2
