"""Response files: one response a line of the batch file, in its order; `verify` knows them and names what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.batch_files import make_chat, make_completion, read_responses, write_batch

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, OutputConfig, RunConfig
from dpgen.data.input_loading import load_input
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import compute_run_identity
from dpgen.journal.writer import JournalWriter
from dpgen.logprobs import TokenLogprobs
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_writer import write_dataset
from dpgen.output.openai_batch.publish import check_output_file, publish_responses
from dpgen.output.verification import verify
from dpgen.records import Completion, RowError, RowResult

NUM_LINES = 5
FIRST = "train-00000-of-00003.jsonl"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """Finish a run over five lines, the fourth of them malformed, in files of two responses."""
    lines = [make_chat("a"), make_completion("b", logprobs=1), make_chat("c"), "broken", make_chat("e")]
    source = write_batch(tmp_path / "in.jsonl", lines)
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run"), engine="fake"),
        model="none",
        data=DataConfig(path=str(source), format="openai_batch"),
        output=OutputConfig(format="openai_batch", rows_per_file=2),
    )
    rows, run_dir = load_input(config.data), RunDir(config.run.dir)
    run_dir.create()
    run_dir.write_config(config)
    run_dir.update_metadata(identity=compute_run_identity(config, rows.fingerprint()), created=5)
    journal = JournalWriter(run_dir.journal, 1, 0)
    one = np.array([97], np.int32)
    logprobs = TokenLogprobs(one, np.array([-1], np.float32), one, np.array([-1], np.float32))
    for row in (4, 1, 0, 2):
        journal.append(
            RowResult(row, 3, (Completion(f"text {row}", "stop", 1, logprobs=logprobs if row == 1 else None),))
        )
    journal.append(RowResult(3, error=RowError("bad_request", "no JSON")))
    journal.close()
    write_dataset(rows, run_dir, DatasetFormat.from_config(config), 2)
    return run_dir


def change(run_dir: RunDir, number: int, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change one response of the first file."""
    path = run_dir.dataset / FIRST
    lines = path.read_text().splitlines()
    response = json.loads(lines[number])
    edit(response)
    lines[number] = json.dumps(response)
    path.write_text("".join(line + "\n" for line in lines))


def test_responses_are_in_the_order_of_the_lines_and_numbered_files(run_dir: RunDir) -> None:
    names = [f"train-0000{number}-of-00003.jsonl" for number in range(3)]
    assert sorted(path.name for path in run_dir.dataset.iterdir()) == names
    responses = [response for name in names for response in read_responses(run_dir.dataset / name)]
    assert [response["custom_id"] for response in responses] == ["a", "b", "c", None, "e"]
    assert [response["response"]["status_code"] for response in responses] == [200, 200, 200, 400, 200]
    bodies = [response["response"]["body"] for response in responses]
    assert [body and body["created"] for body in bodies] == [5, 5, 5, None, 5]
    assert bodies[4]["choices"][0]["message"]["content"] == "text 4"


def test_sound_responses_verify_and_the_unchecked_is_named(run_dir: RunDir) -> None:
    report = verify(run_dir.path)
    assert (report.verdict, report.num_dataset_rows) == ("sound", NUM_LINES)
    assert any("texts of tokens beside log-probabilities were not checked" in note for note in report.notes)
    report = verify(run_dir.path, check_input=False)
    assert report.verdict == "sound"
    assert any("the bodies of responses were not checked" in note for note in report.notes)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda line: line.update(custom_id="z"), "differ from the journal's: rows: 1 (0)"),
        (lambda line: line["response"].update(status_code=201), "differ from the journal's: rows: 1 (0)"),
        (lambda line: line["response"]["body"]["choices"][0]["message"].update(content="other"), "differ from"),
        (lambda line: line["response"]["body"]["usage"].update(total_tokens=0), "differ from"),
    ],
)
def test_a_changed_response_is_found(run_dir: RunDir, edit: Callable[[dict[str, Any]], None], problem: str) -> None:
    change(run_dir, 0, edit)
    assert [text for text in verify(run_dir.path).problems if problem in text]


def test_a_changed_log_probability_is_found(run_dir: RunDir) -> None:
    change(run_dir, 1, lambda line: line["response"]["body"]["choices"][0]["logprobs"].update(token_logprobs=[-2.0]))
    assert [text for text in verify(run_dir.path).problems if "rows: 1 (1)" in text]


def test_responses_that_are_missing_too_many_or_no_json_are_found(run_dir: RunDir) -> None:
    last = run_dir.dataset / "train-00002-of-00003.jsonl"
    text = last.read_text()
    last.write_text("")
    assert any("lacks the responses to rows: 1 (4)" in problem for problem in verify(run_dir.path).problems)
    last.write_text(text * 2)
    assert any("holds 1 responses too many" in problem for problem in verify(run_dir.path).problems)
    last.write_text("broken\n")
    assert any("no JSON: rows: 1 (4)" in problem for problem in verify(run_dir.path).problems)
    last.unlink()
    assert any("holds 2 files of 3" in problem for problem in verify(run_dir.path).problems)


def test_one_file_holds_all_responses_and_a_failure_leaves_the_old_one(run_dir: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    check_output_file(str(out), str(tmp_path / "in.jsonl"), run_dir, {})
    out.write_text("old\n")
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    publish_responses(run_dir, str(link), {})
    assert [response["custom_id"] for response in read_responses(out)] == ["a", "b", "c", None, "e"]
    assert link.is_symlink()
    (run_dir.dataset / FIRST).unlink()
    before = out.read_text()
    with pytest.raises(DpgenError, match="holds 2 files of 3"):
        publish_responses(run_dir, str(out), {})
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("data", "output", "words"),
    [
        ({"format": "rows", "prompt_column": "x"}, {}, "answers the requests of a batch file, and the input is none"),
        ({"prompt_column": "x"}, {}, "answers the requests of a batch file, and the input is none"),
        ({"format": "openai_batch"}, {"messages": True, "explode": True}, "output.messages has no effect"),
        ({"format": "openai_batch"}, {"token_ids": True}, "output.token_ids has no effect"),
        ({"format": "openai_batch", "columns": ["custom_id"]}, {}, "data.columns has no effect"),
    ],
)
def test_keys_that_do_not_go_with_responses_are_refused(
    data: dict[str, Any], output: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(
            run=RunConfig(dir="x"),
            model="none",
            data=DataConfig(path="x.jsonl", **data),
            output=OutputConfig(format="openai_batch", **output),
        )
    assert any(words in mistake for mistake in caught.value.mistakes)
