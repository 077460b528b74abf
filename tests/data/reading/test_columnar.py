"""A column that can't be read costs that column; a type that other readers see in another way is said."""

from __future__ import annotations

import datetime as dt
import re
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.dataset_files import make_run, read_json_lines

from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.reading import cache, conversion
from dpgen.errors import ConfigError
from dpgen.output.export.export import export_run
from dpgen.output.export.selection import Selection
from dpgen.output.format_check import check_output_format
from dpgen.output.verification import verify
from dpgen.records import Completion, RowResult

UNION = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])])
TENSOR = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(4, dtype=np.int32).reshape(2, 2))
UUID = pa.array([b"0123456789abcdef", None], pa.uuid())
BOOL8 = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0], pa.int8()))
RUNS = pa.compute.run_end_encode(pa.array(["a", "a"]))


@pytest.fixture(autouse=True)
def convert_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the second that a process of its own takes; other tests let it crash."""
    monkeypatch.setattr(cache, "_convert_apart", partial(conversion.convert, may_crash=True))


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def load(path: Path) -> InputRows:
    return load_input(DataConfig(path=str(path), prompt_column="question"))


def read(rows: InputRows) -> list[dict[str, Any]]:
    return list(rows.iter_rows(np.arange(len(rows)), rows.columns))


@pytest.mark.parametrize(
    ("array", "values", "note"),
    [
        (TENSOR, [[0, 1], [2, 3]], "arrow.fixed_shape_tensor is read as fixed_size_list<item: int32>[2]"),
        (UUID, [b"0123456789abcdef", None], "arrow.uuid is read as fixed_size_binary[16]"),
        (BOOL8, [True, False], ""),
        (pa.ListArray.from_arrays([0, 1, 2], BOOL8), [[True], [False]], ""),
        (pa.ListArray.from_arrays([0, 1, 2], RUNS), [["a"], ["a"]], ""),
        (pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())), [[{"key": "k", "value": 1}], None], "a map"),
    ],
)
def test_rare_types_are_read_and_a_change_is_said(
    tmp_path: Path, array: pa.Array, values: list[Any], note: str
) -> None:
    rows = load(write(tmp_path / "rows.arrow", pa.table({"question": ["a", "b"], "x": array})))
    assert [row["x"] for row in read(rows)] == values
    assert (f"column x: {note}" if note else "2 columns") in rows.describe([])
    assert len(rows.fingerprint()["content"]) == 32


@pytest.mark.parametrize("array", [UNION, pa.StructArray.from_arrays([UNION], ["x"])])
def test_a_type_that_cannot_be_read_costs_only_its_column(tmp_path: Path, array: pa.Array) -> None:
    rows = load(write(tmp_path / "rows.arrow", pa.table({"question": ["a", "b"], "x": array})))
    assert [row["question"] for row in read(rows)] == ["a", "b"]
    assert "column x is left out: " in rows.describe([])
    assert "the type sparse_union<0: int64=0, 1: string=1> is not supported" in rows.describe([])
    with pytest.raises(ConfigError, match=r"no column can be read: .* is not supported"):
        load(write(tmp_path / "rows.arrow", pa.table({"x": array})))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_columns_of_the_same_name_cost_only_themselves(tmp_path: Path, name: str) -> None:
    arrays = [pa.array(["a"]), pa.array([1]), pa.array([2])]
    rows = load(write(tmp_path / name, pa.Table.from_arrays(arrays, ["question", "x", "x"])))
    assert read(rows) == [{"question": "a"}]
    assert f"column x is left out: {tmp_path}/{name} has several columns of this name" in rows.describe([])


def write_both(folder: Path, one: pa.Array, other: pa.Array) -> Path:
    """Write two files whose column x has other types, and return the pattern of their names."""
    for number, array in enumerate((one, other)):
        write(folder / f"{number}.parquet", pa.table({"question": ["a"] * len(array), "x": array}))
    return folder / "*.parquet"


FAR_DATE = pa.array([dt.datetime(9999, 12, 31)], pa.timestamp("us"))
NANOSECONDS = pa.array([dt.datetime(2020, 1, 1)], pa.timestamp("ns"))
PRICE = pa.array([Decimal("1.25")], pa.decimal128(10, 2))
TIME = pa.array([dt.time(1)], pa.time64("us"))
EXACT_TIME = pa.array([1], pa.time64("ns"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([b"1"]), pa.array(["2"])),
        (pa.array([["1"]]), pa.array([[b"2"]])),
        (FAR_DATE, NANOSECONDS),
        (pa.array([5]), PRICE),
        (pa.array([5], pa.int8()), PRICE),
        (pa.array([0.1]), PRICE),
        (pa.array([{"a": 5}]), pa.array([{"b": "c", "a": 5.5}])),
        (TIME, EXACT_TIME),
    ],
    ids=["bytes", "list-of-bytes", "far-date", "integer", "int8", "float", "object", "nanoseconds"],
)
def test_values_that_would_change_to_be_of_one_type_cost_only_their_column(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    rows = load(write_both(tmp_path, one, other))
    assert read(rows) == [{"question": "a"}, {"question": "a"}]
    assert re.search(r"column x is left out: it is \S+.* in one file and \S+.* in another", rows.describe([]))
    (tmp_path / "back").mkdir()
    assert list(load(write_both(tmp_path / "back", other, one)).unreadable) == ["x"]


@pytest.mark.parametrize(
    ("one", "other", "values", "note"),
    [
        (PRICE, pa.array([Decimal(5)], pa.decimal128(38, 0)), ["1.25", "5.00"], "decimals are read with 2 digits"),
        (pa.array([{"a": 1}]), pa.array([{"b": 2}]), ["{'a': 1, 'b': None}", "{'a': None, 'b': 2}"], r"lack \(b\)"),
        (pa.array([0.5], pa.float32()), pa.array([0.1]), ["0.5", "0.1"], None),
        (pa.array([-1], pa.int8()), pa.array([1 << 62]), ["-1", str(1 << 62)], None),
    ],
    ids=["scale", "keys", "float", "integer"],
)
def test_values_of_two_types_are_joined_where_they_stay_the_same_and_a_change_of_their_text_is_said(
    tmp_path: Path, one: pa.Array, other: pa.Array, values: list[str], note: str | None
) -> None:
    rows = load(write_both(tmp_path, one, other))
    assert [str(row["x"]) for row in read(rows)] == values
    assert ("column x" in rows.describe([])) == (note is not None)
    assert note is None or re.search(note, rows.describe([]))


def test_signed_and_unsigned_integers_are_joined_in_any_number_of_batches(tmp_path: Path) -> None:
    small, large = [-1] * 2_500, [(1 << 63) + row for row in range(2_500)]
    rows = load(write_both(tmp_path, pa.array(small), pa.array(large, pa.uint64())))
    assert [row["x"] for row in read(rows)] == small + large


def make_json(texts: list[str | None], type: pa.DataType | None = None) -> pa.Array:
    type = type or pa.json_()
    return pa.ExtensionArray.from_storage(type, pa.array(texts, type.storage_type))


@pytest.mark.parametrize(
    ("text", "value", "written"),
    [
        ("{bad", "{bad", "{bad"),
        ("", "", ""),
        ("NaN?", "NaN?", "NaN?"),
        ("[" * 100_000, "[" * 100_000, "[" * 100_000),
        ("9" * 5_000, "9" * 5_000, "9" * 5_000),
        (r'["\ud800"]', ["\ud800"], [r"\ud800"]),
    ],
    ids=["bad", "empty", "nan", "deep", "long", "surrogate"],
)
def test_a_text_that_is_no_json_among_json_is_its_own_value_in_every_format(
    tmp_path: Path, text: str, value: Any, written: Any
) -> None:
    """Other rows keep the values of their JSON, and a column that is not used ends no run when it is written."""
    table = pa.table({"question": ["a", "b", "c"], "x": make_json(['{"k": [1]}', text, None])})
    data = DataConfig(path=str(write(tmp_path / "rows.arrow", table)), prompt_column="question")
    rows = load_input(data)
    assert [row["x"] for row in read(rows)] == [{"k": [1]}, value, None]
    note = f"column x: texts that are no JSON are read as they stand (first in {data.path})"
    assert (note in rows.describe([])) == (text == value)
    for file_format in ("jsonl", "parquet"):
        check_output_format(rows, None, file_format)
        results = [RowResult(row, 1, (Completion("t", "stop", 1),)) for row in range(3)]
        run = make_run(tmp_path / file_format, data, results, file_format)
        export_run(run, str(tmp_path / f"{file_format}.jsonl"), "jsonl", Selection())
        lines = read_json_lines(tmp_path / f"{file_format}.jsonl")
        assert [line["x"] for line in lines] == [{"k": [1]}, written, None]
        assert verify(run.path).verdict == "sound"


def test_json_in_large_strings_is_json(tmp_path: Path) -> None:
    table = pa.table({"question": ["a"], "x": make_json(['{"k": 1}'], pa.json_(pa.large_string()))})
    assert read(load(write(tmp_path / "rows.arrow", table))) == [{"question": "a", "x": {"k": 1}}]


def test_json_in_large_strings_within_objects_and_lists_is_json(tmp_path: Path) -> None:
    large = make_json(['{"k": 1}', "2"], pa.json_(pa.large_string()))
    columns = {
        "question": pa.array(["a", "b"]),
        "object": pa.StructArray.from_arrays([large], ["j"]),
        "list": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), large),
    }
    for name in ("rows.arrow", "rows.parquet"):
        assert read(load(write(tmp_path / name, pa.table(columns)))) == [
            {"question": "a", "object": {"j": {"k": 1}}, "list": [{"k": 1}]},
            {"question": "b", "object": {"j": 2}, "list": [2]},
        ]


@pytest.mark.parametrize("num_cut_batches", [0, 1, 2])
def test_an_arrow_stream_without_its_end_is_refused(tmp_path: Path, num_cut_batches: int) -> None:
    """Cut between two batches, it looks whole to Arrow."""
    table, ends = pa.table({"question": ["a" * 100] * 30}), []
    path = tmp_path / "rows.arrow"
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
            ends.append(file.tell())
    assert len(load(path)) == 30
    path.write_bytes(path.read_bytes()[: ends[-1 - num_cut_batches]])
    with pytest.raises(ConfigError, match="lacks the end of an Arrow stream"):
        load(path)


def test_checksums_of_parquet_pages_are_compared(tmp_path: Path) -> None:
    path, options = tmp_path / "rows.parquet", {"write_page_checksum": True, "compression": "none"}
    pq.write_table(pa.table({"question": ["needle" * 9, "b"]}), path, use_dictionary=False, **options)
    assert len(load(path)) == 2
    path.write_bytes(path.read_bytes().replace(b"needle" * 9, b"needle" * 8 + b"noodle"))
    with pytest.raises(ConfigError, match=r"rows\.parquet, row group 0: .*(CRC|checksum)"):
        load(path)


def test_a_feather_file_is_an_arrow_file(tmp_path: Path) -> None:
    assert read(load(write(tmp_path / "rows.feather", pa.table({"question": ["a"]})))) == [{"question": "a"}]
