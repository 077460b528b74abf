"""`dpgen verify`: a sound folder passes, and each kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.jobs import Launcher, make_numbered_rows

from dpgen.commands import verify as command
from dpgen.journal.reader import list_segments, read_segment
from dpgen.journal.writer import JournalWriter
from dpgen.output.verification import VerificationReport, format_ranges, truncate_ranges, verify
from dpgen.records import Completion, RowResult

pytestmark = pytest.mark.multi

ROWS = 50
BAD_ROW = 7


def make_run(folder: Path, rows: Sequence[dict[str, Any]], **sections: Any) -> Path:
    """A finished run of the fake engine on two ranks; its folder."""
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
    """The folder of a finished run of 50 rows in 3 files, one of them failed; not to be changed."""
    rows = make_numbered_rows(ROWS)
    rows[BAD_ROW]["prompt"] = "x" * 600
    for number, row in enumerate(rows):
        row["score"] = None if number == 3 else number / 7
    return make_run(tmp_path_factory.mktemp("finished"), rows, output={"rows_per_file": 20})


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with an input of its own."""
    shutil.copytree(finished, tmp_path / "copy")
    config = tmp_path / "copy" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(tmp_path / "copy")))
    return tmp_path / "copy" / "run"


def segment_with_rows(run: Path) -> Path:
    return next(path for path in list_segments(run / "journal") if len(read_segment(path).frames))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def dataset_file(run: Path, number: int) -> Path:
    return sorted((run / "dataset").glob("train-*"))[number]


def rewrite(path: Path, change: Callable[[dict[str, list[Any]]], None]) -> None:
    """Changes the columns of a Parquet file."""
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.Table.from_pydict(columns, schema=table.schema), path)


def change_success(run: Path, **facts: Any) -> None:
    path = run / "_SUCCESS"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


# ---- what is sound


def test_a_sound_run(run: Path) -> None:
    report = verify(run)
    assert report.verdict == "sound", report.problems
    assert (report.num_rows, report.num_done, report.num_failed, report.num_dataset_rows) == (ROWS, ROWS, 1, ROWS)
    assert report.failed == {"prompt_too_long": str(BAD_ROW)}
    assert report.input == "same" and not report.missing and not report.doubled and not report.notes
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    verify(run)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before, "it changes nothing"


@pytest.mark.parametrize("rows", [[], [{"prompt": "é", "x": float("nan")}] * 3])
@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_other_shapes_are_sound_too(tmp_path: Path, rows: list[dict[str, Any]], format: str) -> None:
    folder = make_run(
        tmp_path / "a",
        rows,
        sampling={"n": 2, "max_tokens": 3},
        output={"format": format, "token_ids": True, "rows_per_file": 2},
    )
    report = verify(folder / "run")
    assert report.verdict == "sound", report.problems


def torn(run: Path) -> None:
    path = segment_with_rows(run)
    path.write_bytes(path.read_bytes() + b"\0" * 99)


def damaged_index(run: Path) -> None:
    path = segment_with_rows(run)
    flip(path, path.stat().st_size - 40)


def second_attempt(run: Path) -> None:
    path = segment_with_rows(run)
    shutil.copy(path, path.with_name("attempt-0009-rank-00000-part-0000.journal"))


def damaged_but_there_twice(run: Path) -> None:
    second_attempt(run)
    flip(segment_with_rows(run), 60)


def input_gone(run: Path) -> None:
    (run.parent / "rows.jsonl").unlink()


@pytest.mark.parametrize(
    ("harm", "shows"),
    [
        (torn, lambda report: min(report.torn_segments.values()) >= 99),
        (damaged_index, lambda report: len(report.damaged_segments) == len(report.notes) == 1),
        (second_attempt, lambda report: report.doubled),
        (damaged_but_there_twice, lambda report: report.doubled and len(report.damaged_segments) == 1),
        (input_gone, lambda report: report.input == "not checked" and "no such file" in report.notes[0]),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_costs_no_row_is_a_note(
    run: Path, harm: Callable[[Path], None], shows: Callable[[VerificationReport], Any]
) -> None:
    harm(run)
    report = verify(run)
    assert report.verdict == "sound", report.problems
    assert shows(report), report


# ---- what is not


def lose_a_segment(run: Path) -> None:
    segment_with_rows(run).unlink()


def flip_a_record(run: Path) -> None:
    flip(segment_with_rows(run), 60)


def rows_of_another(run: Path) -> None:
    log = JournalWriter(run / "journal", 9, 0)
    log.append(RowResult(ROWS + 3, 1, (Completion("a", "stop", 1),)))
    log.close()


def lose_a_file(run: Path) -> None:
    dataset_file(run, 1).unlink()


def lose_the_last_file(run: Path) -> None:
    dataset_file(run, 2).unlink()


def lose_the_dataset(run: Path) -> None:
    shutil.rmtree(run / "dataset")


def other_text(run: Path) -> None:
    rewrite(dataset_file(run, 1), lambda columns: columns["generated_text"].__setitem__(4, "something else"))


def other_error(run: Path) -> None:
    rewrite(dataset_file(run, 0), lambda columns: columns["error"].__setitem__(BAD_ROW, None))


def other_prompt(run: Path) -> None:
    rewrite(dataset_file(run, 1), lambda columns: columns["prompt"].__setitem__(4, "something else"))


def swapped(run: Path) -> None:
    def swap(columns: dict[str, list[Any]]) -> None:
        for values in columns.values():
            values[2], values[3] = values[3], values[2]

    rewrite(dataset_file(run, 0), swap)


def swapped_results(run: Path) -> None:
    """Right rows, right order, but two results under each other's prompt."""

    def swap(columns: dict[str, list[Any]]) -> None:
        for name in ("generated_text", "num_generated_tokens"):
            columns[name][2], columns[name][3] = columns[name][3], columns[name][2]

    rewrite(dataset_file(run, 0), swap)


def doubled(run: Path) -> None:
    shutil.copy(dataset_file(run, 0), dataset_file(run, 1))


def unknown_row(run: Path) -> None:
    rewrite(dataset_file(run, 2), lambda columns: columns["row_id"].__setitem__(9, 5000))


def lose_a_column(run: Path) -> None:
    path = dataset_file(run, 0)
    pq.write_table(pq.read_table(path).drop_columns(["finish_reason"]), path)


def cut_short(run: Path) -> None:
    path = dataset_file(run, 0)
    path.write_bytes(path.read_bytes()[:-100])


def other_input(run: Path) -> None:
    path = run.parent / "rows.jsonl"
    path.write_text(path.read_text().replace("row number 31", "row number 13"))


def garbage(name: str) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        (run / name).write_text("garbage")

    write.__name__ = f"garbage_in_{name}"
    return write


def no_run_json(run: Path) -> None:
    (run / "run.json").unlink()


def run_json_of_something_else(run: Path) -> None:
    (run / "run.json").write_text('{"identity": 3}')


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lose_a_segment, "the journal lacks rows, so their results can't be proven"),
        (flip_a_record, "the journal lacks rows, so their results can't be proven: 1 ("),
        (rows_of_another, "the journal holds rows that the input has not: 1 (53)"),
        (lose_a_file, "the dataset lacks rows: 20 (20-39)"),
        (lose_a_file, "dataset/ holds 2 files, of 3"),
        (lose_the_last_file, "the dataset lacks rows: 10 (40-49)"),
        (lose_the_dataset, "the dataset lacks rows: 50 (0-49)"),
        (other_text, "the dataset's generated_text differs from the journal's: 1 (24)"),
        (other_error, "the dataset's error differs from the journal's: 1 (7)"),
        (other_prompt, "the dataset's prompt differs from the input's: 1 (24)"),
        (swapped, "train-00000-of-00003.parquet is not in input order"),
        (swapped_results, "the dataset's generated_text differs from the journal's: 2 (2-3)"),
        (doubled, "the dataset holds more than once rows: 20 (0-19)"),
        (unknown_row, "train-00002-of-00003.parquet can't be read: it holds a row_id that the input has not"),
        (lose_a_column, "can't be read: 'finish_reason'"),
        (cut_short, "train-00000-of-00003.parquet can't be read"),
        (other_input, "the input is not the one that was run: input.content"),
        (garbage("_SUCCESS"), "_SUCCESS can't be read"),
        (garbage("run.json"), "run.json can't be read"),
        (no_run_json, "there is no run.json"),
        (run_json_of_something_else, "run.json says nothing of an input"),
        (lambda run: change_success(run, num_rows=49), "_SUCCESS says num_rows is 49; it is 50"),
        (lambda run: change_success(run, num_errors=0), "_SUCCESS says num_errors is 0; it is 1"),
        (lambda run: change_success(run, hash="0" * 32), "_SUCCESS says hash is '000"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_not_sound_is_named(
    run: Path, harm: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run)
    assert command.main([str(run)]) == 1
    printed = capsys.readouterr().out
    assert words in printed and printed.endswith("NOT SOUND\n"), printed


def test_damage_is_named_with_its_place(run: Path) -> None:
    path = segment_with_rows(run)
    second = read_segment(path).frames
    flip(path, int(second.offset[1]) + 5)
    report = verify(run)
    row = int(second.row[1])
    assert report.missing == str(row)
    assert report.damaged_segments == {
        path.name: f"1 damaged record, the first at byte {int(second.offset[1]) - 17} (row {row})"
    }


# ---- what is not finished


def test_without_success_it_is_unfinished(run: Path) -> None:
    (run / "_SUCCESS").unlink()
    assert verify(run).verdict == "unfinished"


@pytest.mark.slow
def test_an_unfinished_run(launcher: Launcher, write_config: Callable[..., str], tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, ranks=2)
    deadline_s = time.monotonic() + 60
    while sum(path.stat().st_size for path in (tmp_path / "run").glob("journal/*")) < 1000:
        assert time.monotonic() < deadline_s, job.output
        time.sleep(0.05)
    verify(tmp_path / "run")  # of a live run, too
    job.end()
    report = verify(tmp_path / "run")
    assert report.verdict == "unfinished", report.problems
    assert 0 < report.num_done < 200 and report.missing
    assert launcher.dpgen("run", conf, "engine.step_s=0").wait() == 0
    assert verify(tmp_path / "run").verdict == "sound"


# ---- the command


def test_the_command_and_its_exit_status(launcher: Launcher, run: Path) -> None:
    sound = launcher.dpgen("verify", str(run))
    assert sound.wait() == 0, sound.output
    assert sound.output.splitlines()[-1] == "complete and sound"
    assert f"prompt_too_long: {BAD_ROW}" in sound.output
    (run / "_SUCCESS").unlink()
    as_json = launcher.dpgen("verify", "--json", "--no-input", str(run))
    assert as_json.wait() == 1
    found = json.loads(as_json.output)
    assert (found["verdict"], found["num_done"], found["input"]) == ("unfinished", ROWS, "not checked")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one run folder"),
        (["a", "b"], "name one run folder"),
        (["--jsn", "a"], "unknown option --jsn"),
        (["no/such/folder"], "there is no folder no/such/folder"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    from dpgen.cli import main

    assert main(["--help"]) == 0
    assert "dpgen verify RUN_DIR" in capsys.readouterr().out
    assert main(["verify", "--help"]) == 0
    assert "--no-input" in capsys.readouterr().out


def test_ranges() -> None:
    assert format_ranges(np.array([], np.int64)) == ""
    assert format_ranges(np.array([4])) == "4"
    assert format_ranges(np.array([0, 1, 2, 5, 7, 8])) == "0-2,5,7-8"
    assert truncate_ranges("1,22,333", 6) == "1,22, ..."
