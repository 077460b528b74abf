"""Tests of batch files as input: each line that is not blank is a row, whatever it holds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.openai_batch.recognition import resolve_format
from dpgen.errors import ConfigError


def make_line(custom_id: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


def make_config(path: Path | str, **data: Any) -> Config:
    return resolve_format(Config(run=RunConfig(dir="run"), data=DataConfig(path=str(path), **data), model="m"))


def read(path: Path, **data: Any) -> tuple[InputRows, list[dict[str, Any]]]:
    config = make_config(path, **data)
    assert config.data.format == "openai_batch"
    rows = load_input(config.data)
    return rows, list(rows.iter_rows(np.arange(len(rows)), rows.columns))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_marks_line_ends_and_blank_lines_are_no_part_of_a_request(tmp_path: Path) -> None:
    lines = [make_line("a", prompt="é"), make_line("b"), make_line("c")]
    content = f"\r\n{lines[0]}\r\n \t \n\n  {lines[1]}\n{lines[2]}".encode()
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + content)
    rows, values = read(tmp_path / "in.jsonl")
    assert values == [{"custom_id": id, "request": line} for id, line in zip("abc", lines, strict=True)]
    assert rows.describe(["request"]) == "read 1 openai_batch file, 3 rows, 2 columns (used: request)"


def test_a_lone_carriage_return_in_a_line_does_not_end_it(tmp_path: Path) -> None:
    line = make_line("a").replace(", ", ",\r")
    (tmp_path / "in.jsonl").write_bytes(f"{line}\n".encode())
    assert read(tmp_path / "in.jsonl")[1] == [{"custom_id": "a", "request": line}]


def test_malformed_lines_and_repeated_ids_are_said_once_and_stay_rows(tmp_path: Path) -> None:
    lines = [make_line("a"), '{"custom_id": "b", "method"', "null", make_line("a"), make_line("a"), make_line("c")]
    (tmp_path / "in.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"custom_id": "\xff"}\n')
    rows, values = read(tmp_path / "in.jsonl")
    assert [row["custom_id"] for row in values] == ["a", "b", None, "a", "a", "c", None]
    assert [row["request"] for row in values[:-1]] == lines
    assert values[-1]["request"] == '{"custom_id": "\udcff"}', "the byte that is not UTF-8 is kept for its error"
    note = rows.describe(["request"])
    assert "3 lines that can't be answered, each an error of its own (first: " in note
    assert "in.jsonl, line 2: the line is no JSON" in note
    assert "1 custom_id on more than one line, and each of these lines is answered" in note


def test_a_compressed_file_is_recognised_and_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(f"{make_line('a')}\n".encode()))
    assert read(tmp_path / "in.jsonl.gz")[1] == [{"custom_id": "a", "request": make_line("a")}]


def test_a_line_of_20_mb_is_one_row(tmp_path: Path) -> None:
    lines = [make_line("a", prompt="x" * 20_000_000), make_line("b")]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert [row["request"] for row in read(tmp_path / "in.jsonl")[1]] == lines


def test_several_files_and_a_selection_of_rows_work_as_for_other_inputs(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(make_line(f"{name}{i}") for i in range(3)))
    rows, values = read(tmp_path / "*.jsonl", select="1:5", limit=3)
    assert [row["custom_id"] for row in values] == ["11", "12", "20"]
    assert rows.fingerprint()["columns"] == ["custom_id", "request"]


def test_lines_of_which_1_percent_malformed_are_read_line_by_line(tmp_path: Path) -> None:
    good = [make_line(str(i), prompt="hello") for i in range(20_000)]
    lines = [line[:-5] if i % 100 == 7 else line for i, line in enumerate(good)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    rows = load_input(make_config(tmp_path / "in.jsonl").data)
    assert len(rows) == 20_000 and "200 lines that can't be answered" in rows.describe([])


@pytest.mark.parametrize(
    ("content", "data", "data_format"),
    [
        (make_line("a"), {}, "openai_batch"),
        ("garbage\n\n[]\n" + make_line("a"), {}, "openai_batch"),
        (make_line("a"), {"template": "{{ custom_id }}"}, "rows"),
        ('{"prompt": "a"}', {"prompt_column": "prompt"}, "rows"),
        ('{"prompt": "a"}', {"format": "openai_batch"}, "openai_batch"),
        ("", {"format": "openai_batch"}, "openai_batch"),
    ],
)
def test_auto_takes_a_file_for_requests_if_it_holds_some_and_no_key_makes_prompts(
    content: str, data: dict[str, Any], data_format: str, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    assert make_config(tmp_path / "in.jsonl", **data).data.format == data_format


@pytest.mark.parametrize("content", ['{"prompt": "a"}', "", '{"custom_id": "a", "url": "x", "body": {}}', "[" * 10_000])
def test_rows_without_a_key_that_makes_prompts_are_rejected_as_ever(content: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="none is set"):
        make_config(tmp_path / "in.jsonl")


def test_a_missing_file_is_the_error_where_nothing_else_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        make_config(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("name", ["in.csv", "in.parquet"])
def test_requests_are_read_from_files_of_lines_only(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a\n1\n")
    config = make_config(tmp_path / name, format="openai_batch")
    with pytest.raises(ConfigError, match=r"data\.format=openai_batch is for files of JSON lines"):
        load_input(config.data)


KEYS: list[dict[str, Any]] = [
    *({"prompt_column": "a"}, {"messages_column": "a"}, {"template": "{{ a }}"}, {"token_ids_column": "a"}),
    *({"completion_column": "a"}, {"as_chat": True}, {"system_prompt": "a"}, {"system_prompt_column": "a"}),
    *({"prefill_column": "a"}, {"chat_template_kwargs_column": "a"}, {"tools": [{"name": "f"}]}, {"tools_column": "a"}),
    *({"add_generation_prompt": False}, {"lora_column": "a"}),
]


@pytest.mark.parametrize("data", KEYS, ids=[next(iter(data)) for data in KEYS])
def test_a_key_that_says_what_each_line_says_is_rejected(data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        make_config(tmp_path / "in.jsonl", format="openai_batch", **data)
    assert f"data.{next(iter(data))} has no effect: with data.format=openai_batch" in str(raised.value)


def test_sampling_from_columns_is_rejected_too(tmp_path: Path) -> None:
    data = DataConfig(path=str(tmp_path / "in.jsonl"), format="openai_batch")
    with pytest.raises(ConfigError, match=r"sampling\.from_columns has no effect: with data\.format=openai_batch"):
        Config(run=RunConfig(dir="run"), data=data, model="m", sampling={"from_columns": {"n": "n"}})
