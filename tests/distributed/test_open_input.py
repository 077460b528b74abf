"""The input of a run is known by its contents: hashed once, and compared with those of older run directories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from dpgen.config.sections import DataConfig
from dpgen.data.input_rows import InputRows
from dpgen.distributed.agreement import open_input
from dpgen.distributed.group import SingleRankGroup
from dpgen.errors import ConfigError
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import describe_hashed_files

ROWS = [{"question": f"{i} + 1 =", "at": f"2024-05-{i + 10}"} for i in range(4)]


def open_rows(path: Path, run_dir: RunDir, **keys: Any) -> tuple[InputRows, dict[str, Any]]:
    data = DataConfig(path=str(path), prompt_column="question", **keys)
    return open_input(data, SingleRankGroup(), run_dir, lambda rows: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(str(tmp_path / "run"))
    run_dir.create()
    return run_dir


def test_contents_are_hashed_once_as_long_as_the_files_are_the_same(
    path: Path, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, fingerprint = open_rows(path, run_dir)
    run_dir.update_metadata(identity={"input": fingerprint}, **describe_hashed_files(rows, fingerprint))
    with monkeypatch.context() as patch:
        patch.setattr(InputRows, "fingerprint", lambda *_, **__: pytest.fail("hashed again"))
        assert open_rows(path, run_dir)[1] == fingerprint
    assert open_rows(path, run_dir, limit=3)[1]["num_rows"] == 3
    path.write_text(path.read_text().replace("3 +", "4 +"))
    assert open_rows(path, run_dir)[1]["content"] != fingerprint["content"]


def test_a_second_run_over_the_same_files_reads_no_row_to_know_them(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_reads, read, cache = 0, InputRows._iter_tables, tmp_path / "cache"

    def count(*arguments: Any) -> Iterator[pa.Table]:
        nonlocal num_reads
        num_reads += 1
        return read(*arguments)

    monkeypatch.setattr(InputRows, "_iter_tables", count)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    runs = [RunDir(str(tmp_path / name)) for name in ("first", "second", "third")]
    fingerprint = open_rows(path, runs[0])[1]
    assert num_reads == 1
    assert open_rows(path, runs[1])[1] == fingerprint and num_reads == 1
    assert open_rows(path, runs[1], select="1:")[1]["num_rows"] == 3 and num_reads == 2, "other rows of the files"
    times = path.stat()
    path.write_text(path.read_text().replace("3 +", "4 +"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_rows(path, runs[2])[1]["content"] != fingerprint["content"], "whatever the file's date says"
    for file in (cache / "dpgen").glob("fingerprint-*"):
        file.write_text("{")
    assert open_rows(path, runs[2])[1]["num_rows"] == 4, "a damaged cache costs only time"


@pytest.mark.parametrize("is_changed", [False, True])
def test_the_input_of_an_older_run_directory_is_compared_as_it_was_read_then(
    path: Path, run_dir: RunDir, is_changed: bool
) -> None:
    """Older versions read the column `at` as dates, so that its hash was another one."""
    rows, now = open_rows(path, run_dir)
    before = rows.fingerprint(version=1)
    assert "version" not in before and before["content"] != now["content"]
    run_dir.update_metadata(identity={"input": before})
    if is_changed:
        path.write_text(path.read_text().replace("3 +", "4 +"))
    assert (open_rows(path, run_dir)[1] == before) is not is_changed


class SecondRank(SingleRankGroup):
    """Stand in for the second rank of a node, whose first rank has read the input already."""

    def __init__(self, first: InputRows, fingerprint: dict[str, Any]) -> None:
        super().__init__()
        self.rank, self.nodes = 1, ["node", "node"]
        self._answers = [[], {}, first.key, fingerprint, len(first)]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [self._answers.pop(0), value]

    def run_on_all_ranks(self, action: Callable[[], Any]) -> Any:
        return action()

    def node_leader_first(self) -> Any:
        return nullcontext()


def test_a_file_replaced_between_two_ranks_of_a_node_is_noticed(path: Path, run_dir: RunDir) -> None:
    data = DataConfig(path=str(path), prompt_column="question")
    first, fingerprint = open_rows(path, run_dir)
    assert open_input(data, SecondRank(first, fingerprint), run_dir, lambda rows: None)[1] == fingerprint
    path.write_text(path.read_text())
    assert open_input(data, SecondRank(first, fingerprint), run_dir, lambda rows: None)[1] == fingerprint, "same rows"
    path.write_text(path.read_text().replace("3 +", "4 +"))
    with pytest.raises(ConfigError, match="ranks or nodes hold different rows"):
        open_input(data, SecondRank(first, fingerprint), run_dir, lambda rows: None)


def test_a_run_directory_inside_the_input_is_refused_before_anything_is_read(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is inside data\.path"):
        open_rows(tmp_path, RunDir(str(tmp_path / "run")))
