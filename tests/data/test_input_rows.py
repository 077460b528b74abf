"""Input rows: data of every kind is loaded, and shards keep each row's index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from dpgen.config.sections import DataConfig
from dpgen.data import input_rows
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.errors import ConfigError

ROWS = [{"prompt": f"p{i}", "size": i} for i in range(10)]


def load(path: object, **keys: object) -> InputRows:
    return load_input(DataConfig(path=path, prompt_column="prompt", **keys))  # type: ignore[arg-type]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "folder"])
def test_every_kind_of_data_gives_the_same_rows(tmp_path: Path, jsonl: Path, kind: str) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path = jsonl
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        dataset.to_csv(path, index=False)
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "arrow":
        import pyarrow as pa

        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, dataset.data.table.schema) as writer:
            writer.write_table(dataset.data.table)
    else:
        dataset.save_to_disk(path)
    rows = load(str(path))
    assert [row for table in rows.iter_tables(3) for row in table.to_pylist()] == ROWS


def test_text_files_are_read_in_order_from_globs_and_lists(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    for path in (str(tmp_path / "*.txt"), [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]):
        rows = load(path)
        assert [row["text"] for table in rows.iter_tables(9) for row in table.to_pylist()] == ["a1", "a2", "b1", "b2"]


def test_a_directory_of_several_splits_needs_data_split(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one, "test": one.select(range(3))}).save_to_disk(tmp_path / "saved")
    assert len(load(str(tmp_path / "saved"), split="test")) == 3
    with pytest.raises(ConfigError, match=r"data.split is needed: there are test, train"):
        load(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="there are only test, train"):
        load(str(tmp_path / "saved"), split="validation")


@pytest.mark.parametrize("select", ["100:", "5:5", "8:2", "100:200:3"])
def test_a_range_that_selects_no_row_is_rejected_with_the_number_of_rows(jsonl: Path, select: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data.select={select}: selects none of the input's \d+ rows$"):
        load(str(jsonl), select=select)


def test_an_input_without_rows_has_none_in_any_range(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for options in ({"select": "3:"}, {"select": ":"}, {"limit": 3}, {"select": "1:", "limit": 0}):
        assert len(load(str(tmp_path / "empty.jsonl"), **options)) == 0


def test_limit_applies_after_select(jsonl: Path) -> None:
    rows = load(str(jsonl), select="1:9:2", limit=3)
    assert [row["size"] for table in rows.iter_tables(9) for row in table.to_pylist()] == [1, 3, 5]
    assert len(load(str(jsonl), limit=100)) == 10


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "prompt,size\n"), ("a.txt", "")]
)
def test_an_empty_file_is_an_empty_input(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert len(load(str(tmp_path / name))) == 0


@pytest.mark.parametrize("empty", ["", "prompt,size\n"])
def test_an_empty_file_among_others_is_skipped(tmp_path: Path, empty: str) -> None:
    (tmp_path / "1.csv").write_text(empty)
    (tmp_path / "2.csv").write_text("prompt,size\na,1\nb,2\n")
    for path in (str(tmp_path / "*.csv"), [str(tmp_path / "2.csv"), str(tmp_path / "1.csv")]):
        assert len(load(path)) == 2


def test_a_file_name_with_brackets_is_not_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "we[i]rd name.jsonl").write_text('{"prompt": "x"}\n')
    assert len(load(str(tmp_path / "we[i]rd name.jsonl"))) == 1


def test_a_saved_format_changes_no_value(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(tmp_path / "saved")
    rows = load(str(tmp_path / "saved"))
    [(_, row)] = rows.shard(np.arange(10), 10, 3).read_positions(0, 1)
    assert type(row["size"]) is int


def test_reading_rows_in_any_way_is_progress(jsonl: Path) -> None:
    num_batches = 0

    def count() -> None:
        nonlocal num_batches
        num_batches += 1

    rows = load(str(jsonl)).with_progress(count)
    for read in (
        lambda: list(rows.iter_rows(np.arange(10), ["prompt"])),
        lambda: list(rows.iter_tables(4)),  # as the result is written
        rows.fingerprint,
    ):
        before = num_batches
        read()
        assert num_batches > before


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.jsonl", "no such file or directory: none.jsonl"),
        ("./none", "no such file or directory"),
        ("file:///data/rows.jsonl", "no such file or directory: /data/rows.jsonl"),
        ("/nowhere/*.jsonl", "no file matches"),
        ("bad.jsonl", "data.path=.*JSON"),
        ("rows.xyz", "none of the known kinds: .jsonl"),
        (["rows.jsonl", "a.csv"], "several kinds: csv, json"),
    ],
)
def test_an_input_that_cannot_be_read_is_named(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch, path: object, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"')
    (tmp_path / "rows.xyz").write_text("x")
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    with pytest.raises(ConfigError, match=words):
        load(path)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 12])
def test_shards_hold_each_row_once_with_its_index(jsonl: Path, num_shards: int) -> None:
    rows = load(str(jsonl))
    order = np.array([9, 1, 4, 5, 0, 7, 2])  # some rows are finished, and work order is not input order
    row_ids: list[int] = []
    for index in range(num_shards):
        shard = rows.shard(order, num_shards, index, ["size"])
        rows_read = list(shard.read_positions(0, len(shard)))
        assert all(row == {"size": row_id} for row_id, row in rows_read), "a row's index stays with its content"
        row_ids += [row_id for row_id, _ in rows_read]
    assert sorted(row_ids) == sorted(order)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_opening_a_shard_selects_only_its_own_rows(
    jsonl: Path, monkeypatch: pytest.MonkeyPatch, is_resumed: bool
) -> None:
    rows = load(str(jsonl))
    order = np.delete(np.arange(len(rows)), 3) if is_resumed else np.arange(len(rows))
    num_selected: list[int] = []
    select = type(rows.dataset).select

    def count(dataset: Any, indices: Any, *arguments: Any, **options: Any) -> Any:
        num_selected.append(len(indices))
        return select(dataset, indices, *arguments, **options)

    monkeypatch.setattr(type(rows.dataset), "select", count)
    shard = rows.shard(order, 4, 1, ["size"])
    assert sum(num_selected) <= len(shard), f"{num_selected} rows selected for {len(shard)}"
    assert [row_id for row_id, _ in shard.read_positions(0, len(shard))] == order[1::4].tolist()


def test_the_fingerprint_depends_on_the_contents_not_on_the_files(tmp_path: Path, jsonl: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "same.parquet")
    same = load(str(tmp_path / "same.parquet")).fingerprint()
    assert load(str(jsonl)).fingerprint() == same
    assert load(str(jsonl), limit=9).fingerprint() != same
    jsonl.write_text(jsonl.read_text().replace("p3", "P3"))
    assert load(str(jsonl)).fingerprint()["content"] != same["content"]


def test_rows_beyond_the_limit_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    first = [{"prompt": f"row {index}", "hint": index % 3 == 0 or None} for index in range(10)]
    for name, follows in (("a", None), ("b", True)):
        rows = [*first, *[{"prompt": "another", "hint": follows}] * 5]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = (load(str(tmp_path / f"{name}.jsonl"), limit=10).fingerprint() for name in "ab")
    assert one == other


@pytest.mark.parametrize("limit", [0, 1, 5, 10])
def test_the_fingerprint_of_the_first_rows_is_that_of_the_smaller_input(
    jsonl: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(input_rows, "_HASH_BATCH_ROWS", 3)
    assert load(str(jsonl)).fingerprint(limit) == load(str(jsonl), limit=limit).fingerprint()


@pytest.mark.parametrize("key", ["name", "revision"])
def test_keys_for_the_hub_are_rejected_for_an_input_on_disk(tmp_path: Path, jsonl: Path, key: str) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path in (str(jsonl), [str(jsonl)], str(tmp_path / "*.jsonl"), str(tmp_path / "saved")):
        with pytest.raises(ConfigError, match=rf"data\.{key}=v1 is for a dataset of the Hub"):
            load(path, **{key: "v1"})


def test_a_number_of_too_many_digits_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x", "size": size}) + "\n" for size in (7, 10**400, "many", None)))
    hints = load(str(path)).read_numbers("size", np.arange(4))
    assert np.array_equal(hints, [7, np.nan, np.nan, np.nan], equal_nan=True), "a run would end over one row's hint"
