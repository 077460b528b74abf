"""What a file says is what a row holds: no value changes without a word, and a bad value is its row's error alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpgen.config.prompt import PromptConfig
from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.render import PromptRenderer
from dpgen.data.reading import json_lines
from dpgen.errors import ConfigError, RowRefused


def load(path: object, **keys: Any) -> InputRows:
    return load_input(DataConfig(path=str(path), prompt_column="question", **keys))


def read(rows: InputRows) -> list[dict[str, Any]]:
    return list(rows.iter_rows(np.arange(len(rows)), rows.columns))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_exactly(batches: list[list[dict[str, Any]]], uses_arrow: bool, folder: Path) -> list[dict[str, Any]]:
    """Return rows as they come out of an Arrow file that was made of these batches, one file each."""
    from dpgen.data.reading.conversion import convert

    files = [str(write_lines(folder / f"{number}.jsonl", rows)) for number, rows in enumerate(batches)]
    for old in folder.glob("*.arrow"):
        old.unlink()
    description = convert("json", files, folder, may_crash=uses_arrow)
    import datasets

    from dpgen.data.input_source import InputSource

    rows = InputRows(datasets.Dataset.from_file(str(folder / "rows.arrow")), InputSource(description=description))
    return read(rows)


texts = st.text(st.characters(codec=None), max_size=6) | st.sampled_from(
    ["2024-05-06", "2024-05-06T07:08:09", "1", "null"]
)
numbers = st.integers(-(2**70), 2**70) | st.integers(-3, 3) | st.floats(allow_nan=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.lists(
    st.dictionaries(st.sampled_from(["a", "b", "ü"]), values, min_size=1, max_size=3), min_size=1, max_size=4
)


@pytest.mark.parametrize("uses_arrow", [False, True])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(objects, min_size=1, max_size=3))
def test_rows_of_json_lines_are_what_json_loads_returns(
    tmp_path: Path, uses_arrow: bool, batches: list[list[dict[str, Any]]]
) -> None:
    names = {name for rows in batches for row in rows for name in row}
    expected = [{**dict.fromkeys(names), **json.loads(json.dumps(row))} for rows in batches for row in rows]
    assert read_exactly(batches, uses_arrow, tmp_path) == expected


@pytest.mark.parametrize("uses_arrow", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [{"q": "2024-05-06T07:08:09", "id": "2024-05-06"}, {"q": "2024-05-07", "id": "x"}],
        [{"at": {"day": "2024-05-06", "n": 1}}, {"at": {"day": "2024-05-07", "n": 2}}],
        [{"hash": 17293822569102704641}, {"hash": 5}],
        [{"hash": -1}, {"hash": 2**63}],
        [{"n": 2**53 + 1}, {"n": 0.5}],
        [{"messages": [{"role": "user", "content": "1"}]}, {"messages": [{"role": "user", "content": [{"t": "1"}]}]}],
        [{"arguments": {"x": 1}}, {"arguments": {"x": "one", "y": None}}, {"arguments": None}],
        [{"mixed": "5"}, {"mixed": 5}, {"mixed": [5]}, {"mixed": True}, {"mixed": 0.1234567890123456789}],
        [{"empty": {}}, {"empty": {}}],
        [{"path": "a/b\\c\u2028"}, {"path": "\x00"}],
        [{"named": {"\x00": 1, "a\x00b": [{"\x00": None}]}}, {"named": {"\x00": 2, "a\x00b": []}}],
    ],
)
def test_values_that_readers_like_to_change_are_kept(
    tmp_path: Path, rows: list[dict[str, Any]], uses_arrow: bool
) -> None:
    batches = [rows, rows[::-1], *[[row] for row in rows]]
    read_rows = read_exactly(batches, uses_arrow, tmp_path)
    assert [json.dumps(row) for row in read_rows] == [json.dumps(row) for batch in batches for row in batch]


@pytest.mark.parametrize(
    ("late", "kind"), [("late", "another type"), (None, "no value"), ({"a": 1}, "an object"), (0.5, "a decimal")]
)
@pytest.mark.parametrize("early", [None, 3, [], [{"a": 1}]])
def test_a_type_that_only_late_rows_have_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: Any, late: Any, kind: str
) -> None:
    monkeypatch.setattr("dpgen.data.reading.source.BATCH_BYTES", 1 << 10)
    rows = [{"question": f"{i} " + "x" * 99, "meta": early if i < 40 else late} for i in range(50)]
    rows += [{"question": "last", "meta": late, "extra": "late"}]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert read(load(tmp_path / "rows.jsonl")) == [{"extra": None, **row} for row in rows]


def test_whole_numbers_among_decimals_are_named(tmp_path: Path) -> None:
    rows = load(write_lines(tmp_path / "rows.jsonl", [{"score": 1}, {"score": 0.5}]))
    assert read(rows) == [{"score": 1.0}, {"score": 0.5}]
    assert "column score: whole numbers among decimals are read as decimals" in rows.describe([])
    write_lines(tmp_path / "1.jsonl", [{"x": {"score": 0.5, "name": "a"}}])
    write_lines(tmp_path / "2.jsonl", [{"x": {"name": "b", "score": 1}}])
    assert "column x: whole numbers among decimals" in load(tmp_path / "[12].jsonl").describe([])


def test_a_csv_cell_stays_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "id,code,answer,size,ratio,flag,big\n007,1e,NA,1,0.5,True,17293822569102704641\n08,NaN,null,,0.25,False,1\n"
    )
    rows = load(tmp_path / "rows.csv")
    assert read(rows) == [
        {"id": "007", "code": "1e", "answer": "NA", "size": 1, "ratio": 0.5, "flag": True, "big": 17293822569102704641},
        {"id": "08", "code": "NaN", "answer": "null", "size": None, "ratio": 0.25, "flag": False, "big": 1},
    ]
    assert rows.describe([]) == "read 1 csv file, 2 rows, 7 columns"


@pytest.mark.parametrize(
    ("cells", "values", "note"),
    [
        (["0.50", "1"], [0.5, 1.0], "0.50 is read as 0.5"),
        (["true", "FALSE"], [True, False], "true is read as True"),
        (["1", "2.5"], [1.0, 2.5], "1 is read as 1.0"),
        (["99999999999999999999", "0.5"], ["99999999999999999999", "0.5"], None),
    ],
)
def test_a_csv_column_whose_type_changes_its_text_is_named(
    tmp_path: Path, cells: list[str], values: list[Any], note: str | None
) -> None:
    (tmp_path / "rows.csv").write_text("question,x\n" + "".join(f"a,{cell}\n" for cell in cells))
    rows = load(tmp_path / "rows.csv")
    assert [row["x"] for row in read(rows)] == values
    assert (f"column x: {note}" if note else "2 columns") in rows.describe([])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.parquet", "rows.arrow"])
def test_text_that_is_not_utf_8_is_the_error_of_its_row(tmp_path: Path, name: str) -> None:
    lines = [b"caf\xe9 1", b"fine"]
    path, column = tmp_path / name, "text" if name == "rows.txt" else "question"
    table = pa.table({"question": pa.array(lines).view(pa.string())})
    if name == "rows.jsonl":
        path.write_bytes(b"".join(b'{"question": "' + line + b'"}\n' for line in lines))
    elif name == "rows.parquet":
        pq.write_table(table, path)
    elif name == "rows.arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_bytes(b"question\n" * (name == "rows.csv") + b"\n".join(lines) + b"\n")
    assert render(load(path, select="0:2"), column) == ["invalid_text", "fine"]


def test_half_a_surrogate_pair_is_the_error_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "zero"}\n{"question": "1 \\ud83d"}\n{"question": "fine"}\n')
    assert render(load(path, select="1:3"), "question") == ["invalid_text", "fine"]


def render(rows: InputRows, column: str) -> list[Any]:
    """Return the prompt of each of two rows, or its error's type; one of them is not valid, which the log tells."""
    renderer = PromptRenderer(PromptConfig(prompt_column=column), None)
    prompts: list[Any] = []
    for _, row in rows.shard(np.arange(2), 1, 0).read_positions(0, 2):
        try:
            prompts.append(renderer.build_prompt(row))
        except RowRefused as refused:
            prompts.append(refused.type)
    assert "1 row with text that is not valid Unicode" in rows.describe([])
    [table] = rows.iter_tables(9)
    table.validate(full=True)  # the result gets an escape in its place
    return prompts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a\\u0000": 1}\n', r"the key 'a\\x00' holds a zero character"),
        (b"null\n{}\n", "rows.jsonl, line 1 is null, not an object"),
        (b'{"a": 1}\n\n[1, 2]\n', "line 3 is a list, not an object"),
        (b'{"a": 1}\n{"a": "x\n{"a": 2}\n', r"line 2 is not valid JSON: Unterminated string starting at \(column 7\)"),
        ('{"a": 1}\n'.encode("utf-16"), "line 1: UTF-16, not UTF-8. Convert it: iconv -f UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", "line 1 is nested too deep"),
    ],
)
def test_a_file_that_is_no_json_lines_is_named_with_its_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "fine.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / "*.jsonl")


@pytest.mark.parametrize(
    ("line", "value", "note"),
    [
        ('{"a": 1, "a": 2}', {"a": 2}, "an object repeats the key 'a', whose last value counts"),
        ('{"a": {"b": 1, "b": [2]}}', {"a": {"b": [2]}}, "an object repeats the key 'b', whose last value counts"),
        ('{"a": 1e400}', {"a": float("inf")}, "a number beyond a float's range is read as an infinity"),
    ],
)
def test_a_value_that_readers_take_differently_is_said(
    tmp_path: Path, line: str, value: dict[str, Any], note: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": null}\n' + line + "\n")
    rows = load(tmp_path / "rows.jsonl")
    assert read(rows) == [{"a": None}, value]
    assert f"; {note} (first: {tmp_path}/rows.jsonl, line 2)" in rows.describe([])


def test_the_line_of_an_error_counts_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpgen.data.reading.source.BATCH_BYTES", 100)
    (tmp_path / "rows.jsonl").write_text('{"a": "some text"}\n' * 50 + '{"a": \n' + '{"a": "x"}\n')
    with pytest.raises(ConfigError, match="line 51 is not valid JSON"):
        load(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst", "lz4"])
def test_compressed_files_need_no_package(tmp_path: Path, suffix: str) -> None:
    import lzma

    content = b'{"question": "1 + 1 ="}\n' * 3
    path = tmp_path / f"rows.jsonl.{suffix}"
    names = {"gz": "gzip", "zst": "zstd", "bz2": "bz2", "lz4": "lz4"}
    if suffix == "xz":
        path.write_bytes(lzma.compress(content))
    else:
        with pa.output_stream(str(path), compression=names[suffix]) as stream:
            stream.write(content)
    assert read(load(path)) == [{"question": "1 + 1 ="}] * 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "rows.jsonl",
            gzip.compress(b'{"question": "a"}\n', mtime=0),
            r"its content is that of a \.gz file: let its name end in",
        ),
        ("rows.csv", b"PK\3\4" + bytes(30), r"its content is that of a \.zip file: unpack it"),
        ("rows.jsonl.gz", b'{"question": "a"}\n', r"it is not compressed: let its name not end in \.gz"),
        ("rows.jsonl.xz", b'{"question": "a"}\n', r"it is not compressed: let its name not end in \.xz"),
        ("rows.jsonl.zst", gzip.compress(b"{}", mtime=0), r"its content is that of a \.gz file"),
        ("rows.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        ("rows.jsonl.gz", b"", "has 0 bytes, and the smallest .gz file has more"),
        ("rows.csv.xz", b"", "has 0 bytes"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / name)


def test_types_that_other_readers_do_not_know_become_plain_ones(tmp_path: Path) -> None:
    columns = {
        "view": pa.array(["a", None], pa.string_view()),
        "large": pa.array(["a", "b"], pa.large_string()),
        "dictionary": pa.array(["a", "a"]).dictionary_encode(),
        "decimal": pa.array([1, None], pa.decimal64(5, 2)),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "views": pa.array([["a"], []], pa.list_(pa.string_view())),
        "list_view": pa.array([["a"], None], pa.list_view(pa.string())),
    }
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), pa.table(columns).schema) as writer:
        writer.write_table(pa.table(columns))
    rows = load(tmp_path / "rows.arrow")
    first = read(rows)[0]
    assert {name: str(value) for name, value in first.items()} == {
        "view": "a",
        "large": "a",
        "dictionary": "a",
        "decimal": "1.00",
        "map": "[{'key': 'k', 'value': 1}]",
        "views": "['a']",
        "list_view": "['a']",
    }
    assert len(rows.fingerprint()["content"]) == 32


def test_a_column_that_is_not_needed_need_not_be_readable(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a"], "id": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"question": ["b"], "id": ["x"]}), tmp_path / "2.parquet")
    rows = load(tmp_path / "*.parquet")
    assert read(rows) == [{"question": "a"}, {"question": "b"}]
    assert list(rows.unreadable) == ["id"]
    assert "column id is left out: it is int64 in one file and string in another" in rows.describe([])


def test_a_column_that_some_files_lack_is_null_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"question": ["b"], "id": [1]}), tmp_path / "2.parquet")
    assert read(load(tmp_path / "*.parquet")) == [{"question": "a", "id": None}, {"question": "b", "id": 1}]


def test_memory_is_bounded_by_bytes_not_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpgen.data.input_rows._READ_BATCH_BYTES", 1 << 20)
    monkeypatch.setattr("dpgen.data.reading.arrow_spool.BATCH_BYTES", 1 << 18)
    texts = [f"t{i} " * (1 << 14 if i < 200 else 1) for i in range(1_000)]
    (tmp_path / "rows.csv").write_text("question\n" + "".join(f"{text}\n" for text in texts))
    rows = load(tmp_path / "rows.csv")
    tables = list(rows.iter_tables(10_000))
    assert max(table.nbytes for table in tables) < 3 << 20, "a table of 10,000 rows would have 16 MB"
    assert [text for table in tables for text in table["question"].to_pylist()] == texts


def test_json_values_are_read_by_arrow_where_it_changes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way is taken; all other tests would pass without it, and large inputs would be slow."""
    rows = [{"question": "a", "n": 1, "x": [0.5], "m": {"role": "user"}}, {"question": "b", "n": 2, "x": [], "m": None}]
    monkeypatch.setattr(json_lines.JsonReader, "_parse_exactly", lambda *_: pytest.fail("parsed line by line"))
    assert read_exactly([rows], True, tmp_path) == rows
