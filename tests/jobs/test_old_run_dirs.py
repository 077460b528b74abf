"""Test that run directories of an older commit are verified, resumed and extended (see tests/run_dirs/README.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers.jobs import REPO, Launcher

from dpgen.journal.reader import index_journal, list_segments, read_segment
from dpgen.output.verification import verify

pytestmark = pytest.mark.multi

NUM_ROWS = 48
TOO_LONG_ROW, REJECTED_ROW = 5, 11
MISSING_ROWS = [33, 34, *range(36, 48)]  # of the unfinished run


@pytest.fixture
def old_runs(tmp_path: Path) -> Path:
    """Copy the folder with both runs, their input and their configuration."""
    shutil.copytree(REPO / "tests" / "run_dirs" / "1b51951", tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture
def launcher(old_runs: Path, tmp_path: Path) -> Iterator[Launcher]:
    """Start jobs in the copy, since all paths are relative."""
    launcher = Launcher(tmp_path, cwd=old_runs)
    yield launcher
    for job in launcher.jobs:
        job.end()


def run_to_end(launcher: Launcher, *arguments: str, ranks: int = 1) -> str:
    """Run dpgen, and return its output."""
    job = launcher.dpgen(*arguments, ranks=ranks)
    assert job.wait() == 0, job.output
    return job.output


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted((run_dir / "dataset").glob("train-*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def list_journaled_rows(run_dir: Path, attempt: int) -> list[int]:
    """Return the rows that an attempt generated."""
    segments = [path for path in list_segments(run_dir / "journal") if path.name.startswith(f"attempt-{attempt:04d}-")]
    assert segments, f"attempt {attempt} wrote no segment"
    return sorted(row for path in segments for row in read_segment(path).frames.row.tolist())


def read_files(directory: Path) -> dict[Path, tuple[bytes, int]]:
    """Return content and modification time of every file below the directory."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def test_a_finished_run_of_an_older_commit_is_complete_and_sound(launcher: Launcher, old_runs: Path) -> None:
    assert "hash_version" not in json.loads((old_runs / "finished" / "_SUCCESS").read_text()), (
        "an older commit wrote it"
    )
    output = run_to_end(launcher, "verify", "finished")
    assert output.splitlines()[-1] == "complete and sound", output
    assert "  input     same" in output, output


@pytest.mark.slow
def test_a_finished_run_of_an_older_commit_is_left_as_it_is(launcher: Launcher, old_runs: Path) -> None:
    files = read_files(old_runs / "finished")
    assert "already" in run_to_end(launcher, "run", "conf.yaml", ranks=2)
    assert read_files(old_runs / "finished") == files, "nothing is generated or written again"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_an_unfinished_run_of_an_older_commit_is_resumed(launcher: Launcher, old_runs: Path, ranks: int) -> None:
    run_dir = old_runs / "unfinished"
    assert len(index_journal(run_dir / "journal")) == NUM_ROWS - len(MISSING_ROWS)
    run_to_end(launcher, "run", "conf.yaml", "run.dir=unfinished", ranks=ranks)
    assert list_journaled_rows(run_dir, attempt=3) == MISSING_ROWS, "only missing rows are generated"
    assert run_to_end(launcher, "verify", "unfinished").splitlines()[-1] == "complete and sound"
    rows = read_rows(run_dir)
    assert len(rows) == NUM_ROWS
    assert rows == read_rows(old_runs / "finished"), "a row's result depends on neither commit, restart nor world size"


def test_failed_rows_of_an_older_commits_run_can_be_retried(
    launcher: Launcher, old_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = old_runs / "finished"
    rows = read_rows(run_dir)
    assert [row["row_id"] for row in rows if row["error"]] == [TOO_LONG_ROW, REJECTED_ROW]
    run_to_end(launcher, "run", "conf.yaml", "run.retry_errors=true", "engine.refuse_on=null")
    assert list_journaled_rows(run_dir, attempt=2) == [TOO_LONG_ROW, REJECTED_ROW], "only failed rows are retried"
    retried = read_rows(run_dir)
    assert [row["row_id"] for row in retried if row["error"]] == [TOO_LONG_ROW]
    assert retried[REJECTED_ROW]["generated_text"], "the engine accepts the row now"
    assert [row for row in retried if row["row_id"] != REJECTED_ROW] == [
        row for row in rows if row["row_id"] != REJECTED_ROW
    ]
    monkeypatch.chdir(old_runs)
    report = verify(Path("finished"))
    assert report.verdict == "sound", report.problems
    assert json.loads((run_dir / "_SUCCESS").read_text())["hash_version"] == 2
