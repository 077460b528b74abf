"""Rows of a program, of every usual kind, become the same Dataset; others are rejected with the reason."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import polars as pl
import pytest

from dpgen.data.saved_dataset import compute_digest, keep_quiet, save_whole, to_dataset
from dpgen.errors import ConfigError

ROWS = [{"q": "a", "n": 1}, {"q": "b", "n": 2}]
COLUMNS = {"q": ["a", "b"], "n": [1, 2]}


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
    dataset = to_dataset(make())
    assert dataset.to_list() == ROWS
    with keep_quiet():
        assert save_whole(dataset, tmp_path / "rows") and not save_whole(dataset, tmp_path / "rows")
    assert datasets.load_from_disk(str(tmp_path / "rows")).to_list() == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_keys_that_some_rows_lack_are_null() -> None:
    assert to_dataset([{"q": "a"}, {"q": "b", "late": [1]}]).to_list() == [
        {"q": "a", "late": None},
        {"q": "b", "late": [1]},
    ]


@pytest.mark.parametrize("rows", [[], {}, {"q": []}], ids=["no rows", "no columns", "a column"])
def test_inputs_without_a_value_can_be_saved(rows: Any, tmp_path: Path) -> None:
    with keep_quiet():
        assert save_whole(to_dataset(rows), tmp_path / "rows")


def test_values_that_json_has_not_are_kept() -> None:
    row = {"at": datetime.datetime(2024, 1, 2, 3), "raw": b"\x00", "nested": {"a": [{"b": 1.5}]}}
    assert to_dataset([row]).to_list() == [row]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"q": "a", "mixed": 1}, {"q": "b", "mixed": "x"}], "column 'mixed'"),
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
        to_dataset(rows)


def test_a_digest_stands_for_the_contents() -> None:
    assert compute_digest(to_dataset(ROWS)) == compute_digest(to_dataset(pd.DataFrame(COLUMNS)))
    assert compute_digest(to_dataset(ROWS)) != compute_digest(to_dataset(ROWS[:1]))


def test_a_programs_own_settings_of_datasets_come_back() -> None:
    datasets.enable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    with keep_quiet():
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled() and datasets.logging.get_verbosity() == verbosity
