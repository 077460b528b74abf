"""Columns of log-probabilities: their values and size in a result, as the programs that people use read them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.dataset_files import make_rows, make_run

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.journal.run_identity import compute_run_identity, diff_identities
from dpgen.logprobs import TokenLogprobs, from_rows
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_writer import check_output_columns, write_dataset_files
from dpgen.output.verification import verify
from dpgen.records import Completion, RowError, RowResult, ScoredCompletion


def make_logprobs(num_tokens: int, k: int, num_without: int = 0, seed: int = 0) -> TokenLogprobs:
    """Return candidates as a language model gives them: few of a large vocabulary are frequent."""
    random = np.random.default_rng(seed)
    token_ids = np.minimum(random.zipf(1.3, num_tokens), 151_000)
    count = num_tokens - num_without
    top_ids = np.minimum(random.zipf(1.3, (count, k)), 151_000)
    values = -np.sort(random.exponential(3, (count, k)), axis=1)
    rows = np.concatenate([token_ids[num_without:, None], top_ids], axis=1)
    return from_rows(token_ids.tolist(), rows, np.concatenate([-random.exponential(3, (count, 1)), values], axis=1), k)


def write(folder: Path, dataset_format: DatasetFormat, results: list[RowResult]) -> Path:
    folder.mkdir()

    def read_results(row_ids: np.ndarray) -> Iterator[list[RowResult]]:
        yield [results[row] for row in row_ids.tolist()]

    rows = make_rows(pa.table({"x": list(range(len(results)))}))
    write_dataset_files(folder, rows, read_results, dataset_format, 1000)
    [file] = folder.glob("train-*")
    return file


EVERYTHING = DatasetFormat(
    token_ids=True, logprobs=True, top_logprobs=True, prompt_logprobs=True, prompt_top_logprobs=True
)
RESULTS = [
    RowResult(0, 3, (Completion("a", "stop", 2, logprobs=make_logprobs(2, 4)),), None, make_logprobs(3, 2, 1)),
    RowResult(1, None, (), RowError("wrong_type", "x")),
    RowResult(2, 1, (Completion("b", "stop", 1, [5]),)),
]


def to_plain(value: Any) -> Any:
    return None if value is None else [None if item != item else item for item in np.asarray(value).tolist()]


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_readers_of_a_result_get_flat_lists_of_float32_and_null_where_a_token_has_none(
    tmp_path: Path, file_format: str
) -> None:
    file = write(tmp_path / "out", dataclasses.replace(EVERYTHING, file_format=file_format), RESULTS)
    with duckdb.connect() as connection:
        cursor = connection.execute(f"select * from '{file}'")
        names = [column[0] for column in cursor.description]
        readers: dict[str, list[Any]] = {"duckdb": [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]}
    if file_format == "parquet":
        readers["pandas"] = pd.read_parquet(file).to_dict("records")
        readers["polars"] = pl.read_parquet(file).to_dicts()
    else:
        readers["polars"] = pl.read_ndjson(file, infer_schema_length=None).to_dicts()
        readers["json"] = [json.loads(line) for line in file.read_text().splitlines()]
    readers["datasets"] = list(
        datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    )
    sample, prompt = RESULTS[0].completions[0].logprobs, RESULTS[0].prompt_logprobs
    assert sample is not None and prompt is not None
    expected = {
        "generated_token_ids": sample.token_ids,
        "token_logprobs": sample.logprobs,
        "top_token_ids": sample.top_token_ids,
        "top_logprobs": sample.top_logprobs,
        "prompt_token_ids": prompt.token_ids,
        "prompt_logprobs": prompt.logprobs,
        "prompt_top_token_ids": prompt.top_token_ids,
        "prompt_top_logprobs": prompt.top_logprobs,
    }
    for reader, rows in readers.items():
        for name, values in expected.items():
            assert np.array_equal(
                np.array(to_plain(rows[0][name]), values.dtype), values, equal_nan=values.dtype == np.float32
            ), f"{reader}: {name}"
        assert rows[0]["cumulative_logprob"] == pytest.approx(math.fsum(sample.logprobs.tolist()), rel=1e-15)
    for row in (readers["datasets"][1], readers["datasets"][2]):
        assert [row[name] for name in expected if name != "generated_token_ids"] == [None] * 7
    assert readers["datasets"][2]["generated_token_ids"] == [5], "a row that asks for no log-probabilities"


def test_candidates_take_less_than_ten_bytes_each_in_parquet(tmp_path: Path) -> None:
    k, num_tokens = 20, 300
    results = [
        RowResult(row, 1, (Completion("a", "stop", num_tokens, logprobs=make_logprobs(num_tokens, k, seed=row)),))
        for row in range(50)
    ]
    plain = DatasetFormat(token_ids=True, logprobs=True, top_logprobs=True)
    file = write(tmp_path / "out", plain, results)
    num_candidates = len(results) * num_tokens * k
    assert file.stat().st_size / num_candidates < 6.5
    group = pq.read_metadata(file).row_group(0)
    encodings = {
        group.column(index).path_in_schema: group.column(index).encodings for index in range(group.num_columns)
    }
    for name in ("token_logprobs", "top_logprobs"):
        assert "BYTE_STREAM_SPLIT" in encodings[f"{name}.list.element"], encodings
    assert "RLE_DICTIONARY" in encodings["top_token_ids.list.element"], encodings
    assert "RLE_DICTIONARY" in encodings["finish_reason"], "other columns are encoded as ever"


def test_samples_have_a_list_each_and_json_lines_have_the_shortest_decimals(tmp_path: Path) -> None:
    logprobs = from_rows([4, 5], [4, 9, 5, 8], [-0.1, -0.3, math.nan, -math.inf], 1)
    completions = (
        Completion("a", "stop", 2, logprobs=logprobs),
        Completion("b", "stop", 0, logprobs=from_rows([], [], [], 1)),
    )
    jsonl = DatasetFormat(has_samples=True, token_ids=True, logprobs=True, top_logprobs=True, file_format="jsonl")
    [line] = write(tmp_path / "out", jsonl, [RowResult(0, 1, completions)]).read_text().splitlines()
    assert '"token_logprobs": [[-0.1, null], []]' in line and '"top_logprobs": [[-0.3, -9999.0], []]' in line
    assert '"cumulative_logprob": [null, 0.0]' in line and '"generated_token_ids": [[4, 5], []]' in line


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_a_sample_that_is_a_row_of_its_own_has_its_own_lists_beside_its_conversation(
    tmp_path: Path, file_format: str
) -> None:
    prompt, samples = make_logprobs(3, 2, 1), [make_logprobs(2, 4, seed=1), make_logprobs(1, 4, seed=2)]
    results = [
        RowResult(
            0,
            3,
            (
                Completion("a", "stop", 2, reasoning="why", logprobs=samples[0]),
                Completion("b", "stop", 1, parse_error="no", logprobs=samples[1]),
            ),
            prompt_logprobs=prompt,
        ),
        RowResult(1, error=RowError("wrong_type", "x")),
    ]
    (tmp_path / "rows.jsonl").write_text('{"chat": [{"role": "user", "content": "hi"}]}\n{"chat": []}\n')
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), messages_column="chat")
    sampling = {"n": 2, "logprobs": 4, "prompt_logprobs": 2}
    keys = {"explode": True, "messages": True, "reasoning": "split"}
    run = make_run(tmp_path, data, results, file_format, sampling=sampling, **keys).path
    files, cache = str(run / "dataset"), str(tmp_path / "cache")
    first, second, failed = datasets.load_dataset(files, split="train", cache_dir=cache)
    for row, logprobs in ((first, samples[0]), (second, samples[1])):
        assert row["generated_token_ids"] == logprobs.token_ids.tolist()
        assert np.array_equal(np.array(row["token_logprobs"], np.float32), logprobs.logprobs)
        assert np.array_equal(np.array(row["top_logprobs"], np.float32), logprobs.top_logprobs)
        assert row["prompt_token_ids"] == prompt.token_ids.tolist() and row["prompt_logprobs"][0] is None
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert failed["token_logprobs"] is None and failed["prompt_logprobs"] is None and failed["messages"] is None
    report = verify(run)
    assert (report.verdict, report.problems) == ("sound", [])


def test_a_scored_completion_has_columns_of_its_own_and_no_text(tmp_path: Path) -> None:
    scored = ScoredCompletion(from_rows([4, 5], [4, 5], [-0.5, -0.25], 0), is_greedy=True)
    results = [RowResult(0, 3, scored=scored), RowResult(1, error=RowError("empty_completion", "x"))]
    table = pq.read_table(write(tmp_path / "out", DatasetFormat(is_scored=True), results))
    assert table.drop_columns(["x", "row_id"]).to_pylist() == [
        {
            "num_prompt_tokens": 3,
            "error": None,
            "completion_logprob": -0.75,
            "completion_is_greedy": True,
            "completion_token_ids": [4, 5],
            "completion_token_logprobs": [-0.5, -0.25],
        },
        {
            "num_prompt_tokens": None,
            "error": {"type": "empty_completion", "message": "x"},
            **dict.fromkeys(("completion_logprob", "completion_is_greedy")),
            **dict.fromkeys(("completion_token_ids", "completion_token_logprobs")),
        },
    ]


def make_config(sampling: dict[str, Any], completion: str | None = None, **sections: Any) -> Config:
    data = DataConfig(path="x", prompt_column="x", completion_column=completion)
    return Config(run=RunConfig(dir="x"), model="x", data=data, sampling=sampling, **sections)


SAMPLE, PROMPT = {"token_ids", "logprobs"}, {"prompt_logprobs"}
FLAGS = [
    ({}, {}, set()),
    ({"logprobs": None}, {}, set()),
    ({"logprobs": 0}, {}, SAMPLE),
    ({"logprobs": 5}, {}, SAMPLE | {"top_logprobs"}),
    ({"logprob_token_ids": [1, 2]}, {}, SAMPLE | {"top_logprobs"}),
    ({"prompt_logprobs": 0}, {}, PROMPT),
    ({"prompt_logprobs": 1}, {}, PROMPT | {"prompt_top_logprobs"}),
    ({"from_columns": {"logprobs": "k"}}, {}, SAMPLE | {"top_logprobs"}),
    ({}, {"sampling_by_rank": [{}, {"logprobs": 2}]}, SAMPLE | {"top_logprobs"}),
    ({}, {"completion": "answer"}, {"is_scored"}),
    ({"prompt_logprobs": 3}, {"completion": "answer"}, {"is_scored", *PROMPT, "prompt_top_logprobs"}),
]


@pytest.mark.parametrize(("sampling", "others", "flags"), FLAGS)
def test_writer_and_verification_agree_on_the_columns_that_a_run_has(
    sampling: dict[str, Any], others: dict[str, Any], flags: set[str]
) -> None:
    config = make_config(sampling, **others)
    written = DatasetFormat.from_config(config)
    assert {name for name, value in vars(written).items() if value is True} == flags
    assert DatasetFormat.from_identity(json.loads(json.dumps(compute_run_identity(config, {})))) == written
    names = [column.name for column in written.result_columns]
    assert len(set(names)) == len(names)
    check_output_columns(["x"], written)


def test_a_run_of_an_older_version_has_no_columns_for_what_it_did_not_keep() -> None:
    identity = compute_run_identity(make_config({"logprobs": 5}), {})
    older = copy.deepcopy(identity)
    del older["output"]["logprobs"]
    assert DatasetFormat.from_identity(older) == DatasetFormat()
    assert diff_identities(older, identity) == ["log-probabilities in the result: null → true"]
