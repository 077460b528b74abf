"""Test what run.json records of an attempt, and what an attempt reports of the earlier ones."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import pytest

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.distributed import attempt as attempt_module
from dpgen.distributed.attempt import JobStart, begin_attempt, looks_resumable, read_job_start, warn_of_other_settings
from dpgen.distributed.group import SingleRankGroup
from dpgen.errors import DpgenError
from dpgen.journal.row_notes import open_note
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import compute_run_identity
from dpgen.journal.writer import JournalWriter
from dpgen.records import RowResult

INPUT = {"num_rows": 1, "columns": ["prompt"], "content": "00"}


@pytest.fixture(autouse=True)
def attempts_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the lock out, which ends with its process: here several attempts are one process."""
    monkeypatch.setattr(RunDir, "lock", lambda run_dir: None)


def make_config(run_dir: RunDir) -> Config:
    return Config(
        run=RunConfig(dir=str(run_dir.path)), data=DataConfig(path="rows.jsonl", prompt_column="prompt"), model="m"
    )


def begin(run_dir: RunDir, num_rows: int = 1) -> int:
    """Begin an attempt that journals a row, or none, and return its number."""
    config, group = make_config(run_dir), SingleRankGroup()
    start = read_job_start(config, group, run_dir)
    number = begin_attempt(config, group, run_dir, compute_run_identity(config, INPUT), start)
    journal = JournalWriter(run_dir.journal, number, 0)
    for row in range(num_rows):
        journal.append(RowResult(row))
    journal.close()
    return number


def looks(run_dir: RunDir, resume: Literal["auto", "never", "force"] = "auto", **keys: Any) -> bool:
    """Return True if a model may load before the input is read."""
    config = dataclasses.replace(make_config(run_dir), **keys)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=resume))
    group = SingleRankGroup()
    return looks_resumable(config, group, run_dir, {}, read_job_start(config, group, run_dir))


def test_a_model_loads_before_the_input_is_read_unless_the_run_directory_says_that_it_is_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    locked: list[RunDir] = []
    monkeypatch.setattr(RunDir, "lock", lambda run_dir: locked.append(run_dir))
    monkeypatch.setattr(attempt_module, "is_restart", lambda before, now: False)
    monkeypatch.setattr(attempt_module, "_PROCESS_ID", "this")
    assert looks(run_dir) and not run_dir.path.exists(), "a wrong input leaves no directory behind"
    begin(run_dir)
    locked.clear()
    monkeypatch.setattr(attempt_module, "_PROCESS_ID", "another")
    assert looks(run_dir) and looks(run_dir, "force", sampling={"top_p": 0.5}) and len(locked) == 2
    assert not looks(run_dir, sampling={"top_p": 0.5}), "it holds results of other settings"
    assert not looks(run_dir, "never"), "it holds results"
    run_dir.success.touch()
    assert not looks(run_dir), "the result may be complete"
    assert len(locked) == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    assert not looks(RunDir(str(other))), "it holds files that no run wrote"


def test_no_two_attempts_share_a_number_whatever_is_left_of_the_first(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    assert [begin(run_dir, num_rows=0), begin(run_dir, num_rows=0)] == [1, 2], "no segment tells of the first"
    assert not list(run_dir.journal.iterdir())
    assert begin(run_dir) == 3
    (run_dir.path / "run.json").unlink()
    run_dir.update_metadata(identity=compute_run_identity(make_config(run_dir), INPUT))
    assert begin(run_dir) == 4, "the segments' names count where run.json names no attempt"


def test_an_attempt_with_other_versions_than_an_earlier_one_warns_and_both_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    versions = {"dpgen": "0.1.0", "vllm": "0.31.0"}
    monkeypatch.setattr(attempt_module, "read_versions", lambda: dict(versions))
    caplog.set_level(logging.INFO, "dpgen")
    run_dir = RunDir(str(tmp_path / "run"))
    assert [begin(run_dir), begin(run_dir)] == [1, 2]
    assert not caplog.records, "the same versions are not worth a line"
    versions["vllm"] = "0.32.0"
    assert begin(run_dir) == 3
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "attempt 2" in warnings[0] and "vllm 0.31.0 → 0.32.0" in warnings[0], warnings
    recorded = run_dir.read_metadata()["versions"]
    assert [recorded[number]["vllm"] for number in ("1", "2", "3")] == ["0.31.0", "0.31.0", "0.32.0"]


def test_rows_that_are_kept_with_other_settings_are_warned_of_until_the_settings_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, group = RunDir(str(tmp_path / "run")), SingleRankGroup()

    def begin_with(max_tokens: int, num_done: int = 1) -> list[str]:
        caplog.clear()
        config = dataclasses.replace(make_config(run_dir), sampling={"max_tokens": max_tokens})
        start = JobStart("force", {})
        number = begin_attempt(config, group, run_dir, compute_run_identity(config, INPUT), start)
        warn_of_other_settings(run_dir, number, num_done)
        return [record.message for record in caplog.records if record.levelno >= logging.WARNING]

    begin_with(4), begin_with(5)
    assert "earlier_identities" not in run_dir.read_metadata(), "no row was generated with 4"
    journal = JournalWriter(run_dir.journal, 2, 0)
    journal.append(RowResult(0))
    journal.close()
    [warning] = begin_with(9)
    assert "attempt 2 ran with other settings (sampling.max_tokens: 5 → 9)" in warning and "1 are done" in warning
    assert run_dir.read_metadata()["earlier_identities"]["3"]["sampling"] == {"max_tokens": 5}
    assert begin_with(9) == [], "said once"
    assert begin_with(5) == [], "the row is of these settings again, whatever was tried between"
    assert begin_with(7, num_done=0) == [], "all rows are generated again"


def test_a_run_json_of_an_older_version_names_no_versions_and_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    begin(run_dir)
    metadata = run_dir.read_metadata()
    del metadata["versions"]
    (run_dir.path / "run.json").unlink()
    run_dir.update_metadata(**metadata)
    assert begin(run_dir) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class SecondRank(SingleRankGroup):
    """Be rank 1 of two on one node; rank 0 gives the same values."""

    rank, size = 1, 2

    def __init__(self) -> None:
        super().__init__()
        self.nodes = ["node", "node"]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, value]

    def node_leader_first(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.mark.parametrize("is_shared", [True, False])
def test_run_json_is_written_by_another_rank_only_where_rank_0_does_not_see_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    monkeypatch.setattr(attempt_module, "shares_run_dir", lambda *_: is_shared)
    run_dir = RunDir(str(tmp_path / "run"))
    config = make_config(run_dir)
    identity = compute_run_identity(config, INPUT)
    for attempt in (1, 2):
        start = read_job_start(config, SecondRank(), run_dir)
        assert begin_attempt(config, SecondRank(), run_dir, identity, start) == (1 if is_shared else attempt)
        assert run_dir.read_metadata().get("attempt") == (None if is_shared else attempt)
    assert bool(run_dir.read_metadata()) != is_shared, "rank 0's own may look absent for a while on NFS"


def test_a_run_directory_that_rank_0_cannot_write_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DpgenError, match=r"absent can't be written: No such file"):
        attempt_module.shares_run_dir(SingleRankGroup(), tmp_path / "absent")


def test_a_start_that_was_killed_before_its_first_row_is_an_attempt_and_its_notes_are_about_its_input(
    tmp_path: Path,
) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    config, group = make_config(run_dir), SingleRankGroup()
    start = read_job_start(config, group, run_dir)
    for number in (1, 2):
        assert begin_attempt(config, group, run_dir, compute_run_identity(config, INPUT), start) == number
        open_note(run_dir.journal, number, 0)
    assert len(list(run_dir.journal.iterdir())) == 2
    begin_attempt(config, group, run_dir, compute_run_identity(config, {**INPUT, "content": "01"}), start)
    assert not list(run_dir.journal.iterdir()), "row 5 of one input is not row 5 of another"
