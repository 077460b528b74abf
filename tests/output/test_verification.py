"""Test that verify accepts a sound run directory, and names every kind of damage with the rows that it costs."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.jobs import Launcher, make_numbered_rows, wait_for
from helpers.results import count_journal_bytes

from dpgen.commands import verify as command
from dpgen.formatting import format_ranges, truncate_ranges
from dpgen.journal.reader import JournalReader, index_journal, list_segments, read_segment
from dpgen.journal.writer import JournalWriter
from dpgen.output.result_stats import ResultStats
from dpgen.output.verification import VerificationReport, verify
from dpgen.records import Completion, RowResult

pytestmark = [pytest.mark.multi, pytest.mark.xdist_group("verification")]  # one finished run for all

ROWS = 50
BAD_ROW = 7


def make_run(folder: Path, rows: Sequence[dict[str, Any]], **sections: Any) -> Path:
    """Finish a run of the fake engine on two ranks in FOLDER/run, with its input beside it; return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    conf = {
        "run": {"dir": str(folder / "run"), "engine": "fake"},
        "model": "none",
        "data": {"path": str(folder / "rows.jsonl"), "prompt_column": "prompt"},
        **sections,
    }
    (folder / "conf.yaml").write_text(yaml.safe_dump(conf))
    launcher = Launcher(folder)
    job = launcher.dpgen("run", str(folder / "conf.yaml"), ranks=2 if rows else 1)
    try:
        assert job.wait() == 0, job.output
    finally:
        job.end()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run of 50 rows, one of them failed, in 3 files. Tests must not change it."""
    rows = make_numbered_rows(ROWS)
    rows[BAD_ROW]["prompt"] = "x" * 600
    for number, row in enumerate(rows):
        row["score"] = None if number == 3 else number / 7
    return make_run(tmp_path_factory.mktemp("finished"), rows, output={"rows_per_file": 20})


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Copy the finished run and its input; return the copy's run directory."""
    shutil.copytree(finished, tmp_path / "copy")
    config = tmp_path / "copy" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(tmp_path / "copy")))
    return tmp_path / "copy" / "run"


def find_segment_with_rows(run: Path) -> Path:
    return next(path for path in list_segments(run / "journal") if len(read_segment(path).frames))


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def get_dataset_file(run: Path, number: int) -> Path:
    return sorted((run / "dataset").glob("train-*"))[number]


def rewrite(path: Path, change: Callable[[dict[str, list[Any]]], None]) -> None:
    """Change the columns of a Parquet file."""
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.Table.from_pydict(columns, schema=table.schema), path)


def change_success(run: Path, **fields: Any) -> None:
    path = run / "_SUCCESS"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def replace_success_by_version_1(run: Path, **fields: Any) -> None:
    """Replace `_SUCCESS` by one that an older dpgen would have written, which names no version."""
    stats, index = ResultStats(1), index_journal(run / "journal")
    with JournalReader(index) as reader:
        for position in range(len(index)):
            stats.add(reader.result(position))
    success = {name: value for name, value in stats.to_dict().items() if name != "hash_version"}
    (run / "_SUCCESS").write_text(json.dumps({**success, **fields}))


# ---- sound runs


def test_a_sound_run_passes_and_stays_unchanged(run: Path) -> None:
    report = verify(run)
    assert report.verdict == "sound", report.problems
    assert (report.num_rows, report.num_done, report.num_failed, report.num_dataset_rows) == (ROWS, ROWS, 1, ROWS)
    assert report.failed == {"prompt_too_long": str(BAD_ROW)}
    assert report.input == "same" and not report.missing and not report.doubled and not report.notes
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    verify(run)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before, "verify changes nothing"


@pytest.mark.slow
def test_the_hash_is_checked_by_the_version_that_the_file_names(run: Path) -> None:
    assert json.loads((run / "_SUCCESS").read_text())["hash_version"] == 2
    replace_success_by_version_1(run)
    report = verify(run)
    assert report.verdict == "sound", report.problems
    change_success(run, hash_version=1)
    assert verify(run).verdict == "sound", "version 1 may be named"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "format"),
    [
        ([], "parquet"),
        ([], "jsonl"),
        ([{"prompt": "é", "x": float("nan")}] * 3, "parquet"),
        ([{"prompt": "é", "x": 0.5}] * 3, "jsonl"),
    ],
)
def test_runs_without_rows_with_samples_and_in_jsonl_are_sound(
    tmp_path: Path, rows: list[dict[str, Any]], format: str
) -> None:
    folder = make_run(
        tmp_path / "a",
        rows,
        sampling={"n": 2, "max_tokens": 3},
        output={"format": format, "token_ids": True, "rows_per_file": 2},
    )
    report = verify(folder / "run")
    assert report.verdict == "sound", report.problems


def append_torn_tail(run: Path) -> None:
    path = find_segment_with_rows(run)
    path.write_bytes(path.read_bytes() + b"\0" * 99)


def damage_index(run: Path) -> None:
    path = find_segment_with_rows(run)
    flip_bit(path, path.stat().st_size - 40)


def duplicate_rows_in_journal(run: Path) -> None:
    path = find_segment_with_rows(run)
    shutil.copy(path, path.with_name("attempt-0009-rank-00000-part-0000.journal"))


def damage_one_of_two_results(run: Path) -> None:
    duplicate_rows_in_journal(run)
    flip_bit(find_segment_with_rows(run), 60)


def remove_input(run: Path) -> None:
    (run.parent / "rows.jsonl").unlink()


@pytest.mark.parametrize(
    ("harm", "is_noted"),
    [
        (append_torn_tail, lambda report: min(report.torn_segments.values()) >= 99),
        (damage_index, lambda report: len(report.damaged_segments) == len(report.notes) == 1),
        (duplicate_rows_in_journal, lambda report: report.doubled),
        (damage_one_of_two_results, lambda report: report.doubled and len(report.damaged_segments) == 1),
        (remove_input, lambda report: report.input == "not checked" and "no such file" in report.notes[0]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_that_costs_no_row_is_a_note(
    run: Path, harm: Callable[[Path], None], is_noted: Callable[[VerificationReport], Any]
) -> None:
    harm(run)
    report = verify(run)
    assert report.verdict == "sound", report.problems
    assert is_noted(report), report


# ---- unsound runs


def remove_segment(run: Path) -> None:
    find_segment_with_rows(run).unlink()


def damage_record(run: Path) -> None:
    flip_bit(find_segment_with_rows(run), 60)


def append_unknown_row(run: Path) -> None:
    journal = JournalWriter(run / "journal", 9, 0)
    journal.append(RowResult(ROWS + 3, 1, (Completion("a", "stop", 1),)))
    journal.close()


def remove_file(run: Path) -> None:
    get_dataset_file(run, 1).unlink()


def remove_last_file(run: Path) -> None:
    get_dataset_file(run, 2).unlink()


def remove_dataset(run: Path) -> None:
    shutil.rmtree(run / "dataset")


def change_text(run: Path) -> None:
    rewrite(get_dataset_file(run, 1), lambda columns: columns["generated_text"].__setitem__(4, "something else"))


def remove_error(run: Path) -> None:
    rewrite(get_dataset_file(run, 0), lambda columns: columns["error"].__setitem__(BAD_ROW, None))


def change_prompt(run: Path) -> None:
    rewrite(get_dataset_file(run, 1), lambda columns: columns["prompt"].__setitem__(4, "something else"))


def swap_rows(run: Path) -> None:
    def swap(columns: dict[str, list[Any]]) -> None:
        for values in columns.values():
            values[2], values[3] = values[3], values[2]

    rewrite(get_dataset_file(run, 0), swap)


def swap_results(run: Path) -> None:
    """Keep rows and order, but exchange the results of two prompts."""

    def swap(columns: dict[str, list[Any]]) -> None:
        for name in ("generated_text", "num_generated_tokens"):
            columns[name][2], columns[name][3] = columns[name][3], columns[name][2]

    rewrite(get_dataset_file(run, 0), swap)


def duplicate_rows_in_dataset(run: Path) -> None:
    shutil.copy(get_dataset_file(run, 0), get_dataset_file(run, 1))


def set_unknown_row_id(run: Path) -> None:
    rewrite(get_dataset_file(run, 2), lambda columns: columns["row_id"].__setitem__(9, 5000))


def remove_column(run: Path) -> None:
    path = get_dataset_file(run, 0)
    pq.write_table(pq.read_table(path).drop_columns(["finish_reason"]), path)


def truncate_file(run: Path) -> None:
    path = get_dataset_file(run, 0)
    path.write_bytes(path.read_bytes()[:-100])


def change_input(run: Path) -> None:
    path = run.parent / "rows.jsonl"
    path.write_text(path.read_text().replace("row number 31", "row number 13"))


def write_garbage(name: str) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        (run / name).write_text("garbage")

    write.__name__ = f"write_garbage_to_{name}"
    return write


def remove_run_json(run: Path) -> None:
    (run / "run.json").unlink()


def replace_run_json(run: Path) -> None:
    (run / "run.json").write_text('{"identity": 3}')


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (remove_segment, "the journal lacks rows, so their results can't be proven"),
        (damage_record, "the journal lacks rows, so their results can't be proven: 1 ("),
        (append_unknown_row, "the journal holds rows that the input does not have: 1 (53)"),
        (remove_file, "the dataset lacks rows: 20 (20-39)"),
        (remove_file, "dataset/ holds 2 files of 3"),
        (remove_last_file, "the dataset lacks rows: 10 (40-49)"),
        (remove_dataset, "the dataset lacks rows: 50 (0-49)"),
        (change_text, "the dataset's generated_text differs from the journal's: 1 (24)"),
        (remove_error, "the dataset's error differs from the journal's: 1 (7)"),
        (change_prompt, "the dataset's prompt differs from the input's: 1 (24)"),
        (swap_rows, "train-00000-of-00003.parquet is not in input order"),
        (swap_results, "the dataset's generated_text differs from the journal's: 2 (2-3)"),
        (duplicate_rows_in_dataset, "the dataset holds more than once rows: 20 (0-19)"),
        (
            set_unknown_row_id,
            "train-00002-of-00003.parquet can't be read: it holds a row_id that the input does not have",
        ),
        (remove_column, "can't be read: 'finish_reason'"),
        (truncate_file, "train-00000-of-00003.parquet can't be read"),
        (change_input, "the input has changed since the run: input.content"),
        (write_garbage("_SUCCESS"), "_SUCCESS can't be read"),
        (write_garbage("run.json"), "run.json can't be read"),
        (remove_run_json, "there is no run.json"),
        (replace_run_json, "run.json describes no input"),
        (lambda run: change_success(run, num_rows=49), "_SUCCESS: num_rows=49, expected 50"),
        (lambda run: change_success(run, num_errors=0), "_SUCCESS: num_errors=0, expected 1"),
        (lambda run: change_success(run, hash="0" * 32), "_SUCCESS: hash='000"),
        (lambda run: change_success(run, hash_version=1), "_SUCCESS: hash='"),
        (lambda run: change_success(run, hash_version=3), "_SUCCESS: hash_version=3 is unknown"),
        (lambda run: change_success(run, hash_version="2"), '_SUCCESS: hash_version="2" is unknown'),
        (lambda run: change_success(run, hash_version=True), "_SUCCESS: hash_version=true is unknown"),
        (lambda run: replace_success_by_version_1(run, hash="0" * 32), "_SUCCESS: hash='000"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_that_costs_rows_is_a_problem_with_its_rows(
    run: Path, harm: Callable[[Path], None], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run)
    assert run_command(str(run)) == 1
    printed = capsys.readouterr().out
    assert problem in printed and printed.endswith("NOT SOUND\n"), printed


@pytest.mark.parametrize("harm", [remove_file, remove_dataset, change_text, truncate_file])
def test_a_damaged_dataset_is_written_again_from_a_whole_journal(
    run: Path, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run)
    run_command(str(run))
    assert "no row is lost: remove dataset/, and the run's own command writes it again" in capsys.readouterr().out
    remove_segment(run)
    run_command(str(run))
    assert "remove dataset/" not in capsys.readouterr().out, "the dataset may be all that holds the lost rows"


@pytest.mark.parametrize("row", [3, BAD_ROW])
def test_a_result_stays_sound_if_a_rank_that_was_cut_off_journals_its_rows_again(run: Path, row: int) -> None:
    late = JournalWriter(run / "journal", 0, 0)  # read before all others
    late.append(RowResult(row, 5, (Completion("another sample", "stop", 2),)))
    late.close()
    report = verify(run)
    assert report.problems == [] and report.is_finished and report.doubled == str(row)
    rewrite(get_dataset_file(run, 0), lambda columns: columns["generated_text"].__setitem__(row, "from no journal"))
    assert verify(run).problems[0] == f"the dataset's generated_text differs from the journal's: 1 ({row})"


def test_a_damaged_record_is_reported_with_its_offset_and_row(run: Path) -> None:
    path = find_segment_with_rows(run)
    frames = read_segment(path).frames
    flip_bit(path, int(frames.offset[1]) + 5)
    report = verify(run)
    row = int(frames.row[1])
    assert report.missing == str(row)
    assert report.damaged_segments == {
        path.name: f"1 damaged record, the first at byte {int(frames.offset[1]) - 17} (row {row})"
    }


# ---- unfinished runs


def test_a_run_without_success_file_is_unfinished(run: Path) -> None:
    (run / "_SUCCESS").unlink()
    assert verify(run).verdict == "unfinished"


@pytest.mark.slow
def test_a_killed_run_is_unfinished_and_sound_once_resumed(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") >= 1000)
    verify(tmp_path / "run")  # a live run can be verified, too
    job.end()
    report = verify(tmp_path / "run")
    assert report.verdict == "unfinished", report.problems
    assert 0 < report.num_done < 200 and report.missing
    assert launcher.dpgen("run", conf, "engine.step_s=0").wait() == 0
    assert verify(tmp_path / "run").verdict == "sound"


# ---- the command


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(arguments))


def test_the_exit_status_is_0_only_for_a_sound_run(launcher: Launcher, run: Path) -> None:
    sound = launcher.dpgen("verify", str(run))
    assert sound.wait() == 0, sound.output
    assert sound.output.splitlines()[-1] == "complete and sound"
    assert f"prompt_too_long: {BAD_ROW}" in sound.output
    (run / "_SUCCESS").unlink()
    as_json = launcher.dpgen("verify", "--json", "--no-input", str(run))
    assert as_json.wait() == 1
    report = json.loads(as_json.output)
    assert (report["verdict"], report["num_done"], report["input"]) == ("unfinished", ROWS, "not checked")


def test_row_indices_are_printed_as_ranges() -> None:
    assert format_ranges(np.array([], np.int64)) == ""
    assert format_ranges(np.array([4])) == "4"
    assert format_ranges(np.array([0, 1, 2, 5, 7, 8])) == "0-2,5,7-8"
    assert truncate_ranges("1,22,333", 6) == "1,22, ..."
