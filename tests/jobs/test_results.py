"""The dataset that a run writes: its rows, their order, its columns and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.jobs import Launcher, WriteConfig, load_result, make_numbered_rows, read_run_json

pytestmark = pytest.mark.multi


@pytest.mark.slow
def test_two_ranks_write_the_same_rows_as_one_in_input_order(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(101))
    assert launcher.dpgen("run", conf).wait() == 0
    alone = load_result(tmp_path / "run")
    # Without stealing each rank keeps to its shard. With it, the first rank to be ready might do all of so few rows.
    two = ["work.steal=false", f"run.dir={tmp_path / 'two' / 'run'}"]
    assert launcher.dpgen("run", conf, *two, ranks=2).wait() == 0
    together = load_result(tmp_path / "two" / "run")
    assert together == alone
    assert [row["row_id"] for row in together] == list(range(101))
    assert [row["prompt"] for row in together] == [row["prompt"] for row in make_numbered_rows(101)]
    assert all(row["generated_text"] and row["error"] is None for row in together)
    manifests = read_run_json(tmp_path / "two" / "run")["manifests"]
    assert [manifest["num_rows"] for manifest in manifests] == [51, 50], "both ranks generated rows"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "ranks"), [(10, 3), (1, 2), (0, 2)])
def test_a_run_over_few_rows_or_none_succeeds(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, count: int, ranks: int
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(count)), ranks=ranks)
    assert job.wait() == 0, job.output
    assert json.loads((tmp_path / "run" / "_SUCCESS").read_text())["num_rows"] == count
    noun = "row" if count == 1 else "rows"
    assert f"{count} {noun} over {ranks} ranks" in job.output and f"done: {count} {noun}, 0 with" in job.output
    if count:  # `datasets` itself does not load a split without rows
        assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(count))


def test_the_dataset_has_all_samples_their_token_ids_and_the_chosen_columns(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "keep": 1, "drop": 2}, {"prompt": None, "keep": 3, "drop": 4}]
    conf = write_config(
        rows, data={"columns": ["keep"]}, sampling={"n": 2, "max_tokens": 3}, output={"token_ids": True}
    )
    assert launcher.dpgen("run", conf).wait() == 0
    first, second = load_result(tmp_path / "run")
    assert list(first) == [
        "keep",
        "row_id",
        "generated_text",
        "finish_reason",
        "num_prompt_tokens",
        "num_generated_tokens",
        "error",
        "generated_token_ids",
    ]
    assert len(first["generated_text"]) == 2 and first["generated_text"][0] != first["generated_text"][1]
    assert first["num_generated_tokens"] == [3, 3]
    assert first["generated_token_ids"] == [[0, 1, 2], [0, 1, 2]]
    assert second["keep"] == 3 and second["generated_text"] is None


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_dataset_loads_even_if_its_first_error_is_in_the_last_file(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, form: str
) -> None:
    rows: list[dict[str, Any]] = [*make_numbered_rows(24), {"prompt": None}]
    conf = write_config(rows, data={"columns": []}, output={"format": form, "rows_per_file": 10})
    assert launcher.dpgen("run", conf).wait() == 0
    results = load_result(tmp_path / "run")
    assert [row["row_id"] for row in results] == list(range(25)), "even if no input column is kept"
    assert [row["row_id"] for row in results if row["error"]] == [24]
    assert results[24]["error"]["type"] == "wrong_type" and results[0]["error"] is None


def test_jsonl_is_written_in_several_files(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(25), output={"format": "jsonl", "rows_per_file": 10})
    assert launcher.dpgen("run", conf).wait() == 0
    files = sorted(path.name for path in (tmp_path / "run" / "dataset").iterdir())
    assert files == ["README.md"] + [f"train-{number:05d}-of-00003.jsonl" for number in range(3)]
    assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(25))


@pytest.mark.slow
def test_a_run_whose_format_cannot_hold_its_input_is_refused_before_the_model_loads(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    data = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "score": 0.5}, {"prompt": "b", "score": float("nan")}]), data)
    conf = write_config([], data={"path": str(data)}, output={"format": "jsonl"}, engine={"load_s": 1000})
    job = launcher.dpgen("run", conf, ranks=2)
    assert job.wait() != 0
    message = "output.format=jsonl can't hold the column 'score': it holds NaN or an infinity (row 1). Set output"
    assert job.output.count(message) == 1, job.output
    assert launcher.dpgen("run", conf, "data.columns=[prompt]", "engine.load_s=0").wait() == 0
