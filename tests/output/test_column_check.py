"""A column that can't be read is a mistake only where the run needs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.errors import ConfigError
from dpgen.output.column_check import check_columns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"prompt": ["a"], "id": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "id": ["x"]}), tmp_path / "2.parquet")
    return tmp_path


def open_rows(folder: Path, **keys: Any) -> tuple[Config, InputRows]:
    data = DataConfig(**{"path": f"{folder}/*.parquet", "prompt_column": "prompt", **keys})
    return Config(run=RunConfig(dir="run"), data=data, model="m"), load_input(data)


@pytest.mark.parametrize("keys", [{}, {"columns": ["id"]}, {"columns": [], "prompt_column": "id"}])
def test_a_column_that_is_needed_and_unreadable_is_refused_with_the_way_out(folder: Path, keys: dict[str, Any]) -> None:
    config, rows = open_rows(folder, **keys)
    with pytest.raises(
        ConfigError, match=r"column 'id' can't be read: it is int64 .* leave it out: data\.columns=\[prompt\]"
    ):
        check_columns(config, rows)


@pytest.mark.parametrize("columns", [[], ["prompt"]])
def test_a_column_that_nobody_needs_is_left_out(folder: Path, columns: list[str]) -> None:
    config, rows = open_rows(folder, columns=columns)
    check_columns(config, rows)
    assert rows.unreadable, "there is a column that can't be read"


def test_a_completion_column_that_is_not_there_is_refused_with_the_nearest_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.completion_column: 'promt' is no column .* did you mean 'prompt'"):
        check_columns(*open_rows(folder, columns=[], completion_column="promt"))


def test_an_input_column_with_the_name_of_a_column_of_log_probabilities_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "top_logprobs": [1]}), tmp_path / "rows.parquet")
    config, rows = open_rows(tmp_path)
    check_columns(config, rows)
    with pytest.raises(ConfigError, match="'top_logprobs' has the name of a result column"):
        check_columns(dataclasses.replace(config, sampling={"logprobs": 1}), rows)
