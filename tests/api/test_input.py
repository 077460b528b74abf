"""Rows of a program, of every usual kind, become the same Dataset; others are rejected with the reason."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pytest

from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.saved_dataset import compute_digest, keep_quiet, read_as_saved, save_whole, to_input_rows
from dpgen.errors import ConfigError

ROWS: list[dict[str, Any]] = [{"q": "a", "n": 1}, {"q": "b", "n": 2}]
COLUMNS = {"q": ["a", "b"], "n": [1, 2]}


def read(rows: InputRows) -> list[dict[str, Any]]:
    return list(rows.iter_rows(np.arange(len(rows)), rows.columns))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ROWS,
        lambda: tuple(ROWS),
        lambda: COLUMNS,
        lambda: datasets.Dataset.from_list(ROWS),
        lambda: datasets.Dataset.from_list([*ROWS, {"q": "c", "n": 3}]).select([0, 1]),
        lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
        lambda: pd.DataFrame(COLUMNS, index=[7, 9]),
        lambda: pl.DataFrame(COLUMNS),
    ],
    ids=["list", "tuple", "columns", "dataset", "selected", "formatted", "pandas", "polars"],
)
def test_rows_of_every_kind_are_the_same_rows(make: Callable[[], Any], tmp_path: Path) -> None:
    rows = to_input_rows(make())
    assert rows.dataset.to_list() == ROWS
    with keep_quiet():
        assert save_whole(rows, tmp_path / "rows") and not save_whole(rows, tmp_path / "rows")
    assert datasets.load_from_disk(str(tmp_path / "rows")).to_list() == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_keys_that_some_rows_lack_are_null() -> None:
    assert read(to_input_rows([{"q": "a"}, {"q": "b", "late": [1]}])) == [
        {"q": "a", "late": None},
        {"q": "b", "late": [1]},
    ]


# Values of one column that are other rows where Arrow finds their type.
JSON_COLUMNS: dict[str, list[Any]] = {
    "keys": [{"a": 1}, {"b": 2}, {"a": None}],
    "no key": [{}, {}, None],
    "types": [1, "x", True],
    "parts": ["a", [{"type": "text", "text": "b"}], None],
    "lists": [[1, "x"], [], None],
    "large": [2**63, -1, 10**30],
    "numbers": [1, 2.5, None],
    "inexact": [2**53 + 1, 0.5, None],
    "halves": ["\ud83d", {"k\ud83d": ["\udc00"]}, "\ud83d\ude00"],
    "texts": ["\ud83d", "\\ud83d", "é"],
    "dates": ["2024-05-06", "2024-05-06T07:08:09Z", ""],
}


@pytest.mark.parametrize("name", JSON_COLUMNS)
def test_rows_of_a_program_are_the_same_input_as_in_a_file(tmp_path: Path, name: str) -> None:
    rows = [{"q": "a", name: value} for value in JSON_COLUMNS[name]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    in_file = load_input(DataConfig(path=str(tmp_path / "in.jsonl"), prompt_column="q"))
    for given in (rows, {column: [row[column] for row in rows] for column in rows[0]}):
        with keep_quiet():
            save_whole(to_input_rows(given), tmp_path / "rows")
        saved = load_input(DataConfig(path=str(tmp_path / "rows"), prompt_column="q"))
        assert repr(read(saved)) == repr(read(in_file)), "types, too: 1.0 is not 1"
        assert saved.has_added_nulls == in_file.has_added_nulls
        assert saved.fingerprint() == in_file.fingerprint()
        notes = [rows.describe([]).split("2 columns")[1] for rows in (saved, in_file)]
        assert notes[0] == notes[1]
    assert name == "numbers" or read(saved) == json.loads(json.dumps(rows))
    assert ("whole numbers among decimals" in notes[0]) == (name == "numbers")


def test_text_that_is_not_unicode_is_set_aside_beside_values_that_json_has_not() -> None:
    rows = [{"q": "\ud800", "at": datetime.datetime(2024, 1, 2)}, {"q": "b", "at": None}]
    assert read(to_input_rows(rows)) == rows


@pytest.mark.parametrize("rows", [[], {}, {"q": []}], ids=["no rows", "no columns", "a column"])
def test_inputs_without_a_value_can_be_saved(rows: Any, tmp_path: Path) -> None:
    with keep_quiet():
        assert save_whole(to_input_rows(rows), tmp_path / "rows")


def test_values_that_json_has_not_are_kept() -> None:
    row = {"at": datetime.datetime(2024, 1, 2, 3), "raw": b"\x00", "nested": {"a": [{"b": 1.5}]}}
    assert read(to_input_rows([row])) == [row]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"q": "a", "mixed": b""}, {"q": "b", "mixed": 1}], "column 'mixed'"),
        ([{"q": object()}], "column 'q'"),
        ([{}, {}], "its 2 rows have no column"),
        ([{"q": "a"}, "b"], r"dataset\[1\] is a str: must be a dict"),
        ({"q": ["a"], "n": [1, 2]}, "different lengths"),
        ({"q": "one row"}, r"dataset\['q'\] is a str: .* for one row give a list of one dict"),
        ({"q": 5}, r"dataset\['q'\] is a int"),
        (datasets.Dataset.from_list(ROWS).with_transform(lambda batch: batch), "has a transform, which can't be saved"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), r"dataset\['train'\]"),
        (7, "dataset is a int: must be a datasets.Dataset"),
        (None, "dataset is a NoneType"),
        (iter(ROWS), "dataset is a list_iterator"),
    ],
)
def test_rows_that_cannot_be_held_are_rejected_by_name(rows: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        to_input_rows(rows)


def test_a_digest_stands_for_the_contents() -> None:
    frame = pd.DataFrame(COLUMNS)
    assert compute_digest(to_input_rows(frame)) == compute_digest(to_input_rows(datasets.Dataset.from_list(ROWS)))
    assert compute_digest(to_input_rows(ROWS)) == compute_digest(to_input_rows(COLUMNS))
    assert compute_digest(to_input_rows(ROWS)) != compute_digest(to_input_rows(ROWS[:1]))
    escaped = [compute_digest(to_input_rows([{"q": text}])) for text in ("\ud800", "\\ud800")]
    assert escaped[0] != escaped[1], "Arrow holds both as the same text"


def save_as_before(rows: list[dict[str, Any]], directory: Path) -> str:
    """Save rows as versions without a description did, and return their folder's name."""
    older = InputRows(datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in rows[0]}))
    digest = compute_digest(older)
    assert save_whole(older, directory / digest)
    return digest


@pytest.mark.parametrize("name", ["keys", "no key", "lists of nulls", "numbers"])
def test_rows_that_an_older_version_has_saved_are_the_same_input_still(tmp_path: Path, name: str) -> None:
    values = {**JSON_COLUMNS, "lists of nulls": [[{"a": None}], [{"a": None}]]}[name]
    rows = [{"q": "a", name: value} for value in values]
    with keep_quiet():
        digest = save_as_before(rows, tmp_path)
        assert compute_digest(to_input_rows(rows)) != digest
        read_now = read_as_saved(to_input_rows(rows), tmp_path)
        assert compute_digest(read_now) == digest and read_now.has_added_nulls
        assert not save_whole(read_now, tmp_path / digest)
        grown = read_as_saved(to_input_rows([*rows, rows[0]]), tmp_path)
    assert grown.fingerprint(len(rows)) == read_now.fingerprint()


@pytest.mark.parametrize("value", [[1, "x"], "\ud83d"], ids=["types", "half"])
def test_rows_that_an_older_version_could_not_save_are_read_as_new_ones(tmp_path: Path, value: Any) -> None:
    with keep_quiet():
        save_as_before(ROWS, tmp_path)
        rows = to_input_rows([{"q": "a", "x": value}])
        assert read_as_saved(rows, tmp_path) is rows


def test_rows_that_this_version_has_saved_keep_their_reading(tmp_path: Path) -> None:
    rows = to_input_rows([{"q": {"a": 1}}, {"q": {"b": 2}}])
    with keep_quiet():
        assert read_as_saved(rows, tmp_path / "none yet") is rows
        save_whole(rows, tmp_path / compute_digest(rows))
        assert read_as_saved(rows, tmp_path) is rows


def test_a_programs_own_settings_of_datasets_come_back() -> None:
    datasets.enable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    with keep_quiet():
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled() and datasets.logging.get_verbosity() == verbosity
