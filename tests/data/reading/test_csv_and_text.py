"""Cells are what the file says; what a CSV file leaves open is said, and what contradicts itself is refused by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.errors import ConfigError


def load(path: Path, content: str | bytes = "") -> InputRows:
    if content:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_input(DataConfig(path=str(path), prompt_column="question"))


def read(rows: InputRows) -> list[dict[str, Any]]:
    return list(rows.iter_rows(np.arange(len(rows)), rows.columns))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('question\na\n"b\nc\n', "line 3: a quote is opened there and never closed"),
        ('question,n\n"a \\"x\\" b",1\n', "line 2: text follows a closing quote: a quote inside of a quoted cell"),
        ('question,n\n"a\nb",1\nc,2,3\n', "line 4: it has 3 cells, and the header 2 names"),
        (b"question,caf\xe9\na,1\n", "line 1: the header is not UTF-8. Convert .* iconv -f WINDOWS-1252 -t UTF-8"),
    ],
)
def test_a_csv_file_that_contradicts_itself_is_named_with_its_line(
    tmp_path: Path, content: str | bytes, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"rows.csv, {words}"):
        load(tmp_path / "rows.csv", content)


@pytest.mark.parametrize(
    ("content", "rows", "note"),
    [
        (
            "question,a,b\nx,1\ny,2,3\n",
            [{"question": "x", "a": 1, "b": None}, {"question": "y", "a": 2, "b": 3}],
            r"1 row with fewer cells than the header, null there \(first: .*, line 2\)",
        ),
        (
            "question,a,a,\nx,1,2,3\n",
            [{"question": "x", "a": 1, "a.1": 2, "Unnamed: 3": 3}],
            "repeats or lacks names, so columns are called a.1, Unnamed: 3",
        ),
        ("question\nx\n\ny\n", [{"question": "x"}, {"question": "y"}], "1 empty line of .* left out"),
    ],
)
def test_what_a_csv_file_leaves_open_is_said(tmp_path: Path, content: str, rows: list[Any], note: str) -> None:
    loaded = load(tmp_path / "rows.csv", content)
    assert read(loaded) == rows
    with pytest.raises(AssertionError, match=note):
        raise AssertionError(loaded.describe([]))


@pytest.mark.parametrize("number", ["0.1234567890123456789", "1e400", "-1E999", "12345678901234.56789"])
def test_a_number_that_a_float_cannot_hold_stays_a_text(tmp_path: Path, number: str) -> None:
    rows = load(tmp_path / "rows.csv", f"question,x\na,{number}\nb,0.5\n")
    assert [row["x"] for row in read(rows)] == [number, "0.5"]


def test_a_number_as_python_writes_it_is_a_number(tmp_path: Path) -> None:
    numbers = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 123456789012345.6]
    rows = load(tmp_path / "rows.csv", "question,x\n" + "".join(f"a,{number!r}\n" for number in numbers))
    assert [row["x"] for row in read(rows)] == numbers


def test_cells_keep_line_ends_quotes_and_nul(tmp_path: Path) -> None:
    rows = load(tmp_path / "rows.csv", '\ufeffquestion,n\r\n"a\r\n""b""",1\r\n5" disk\x00,2\r\n'.encode())
    assert read(rows) == [{"question": 'a\r\n"b"', "n": 1}, {"question": '5" disk\x00', "n": 2}]


def test_a_file_without_a_header_loses_no_row_unnoticed(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("question,n\na,1\n")
    (tmp_path / "2.csv").write_text("b,2\nc,3\n")
    with pytest.raises(ConfigError, match=r"2\.csv, line 1: the header names none of the columns .* \(question, n\)"):
        load(tmp_path / "*.csv")


def test_a_column_that_a_file_lacks_is_said(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("question,n\na,1\n")
    (tmp_path / "2.csv").write_text("question\nb\n")
    rows = load(tmp_path / "*.csv")
    assert read(rows) == [{"question": "a", "n": 1}, {"question": "b", "n": None}]
    assert f"column n: null in 1 file without it ({tmp_path}/2.csv)" in rows.describe([])


def test_a_zero_byte_in_plain_text_is_no_other_encoding(tmp_path: Path) -> None:
    assert read(load(tmp_path / "rows.txt", b"a\0b\nc\n")) == [{"text": "a\0b"}, {"text": "c"}]
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        with pytest.raises(ConfigError, match=f"line 1: {name}, not UTF-8"):
            load(tmp_path / "rows.txt", "abc\n".encode(encoding))
