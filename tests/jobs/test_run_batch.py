"""`dpgen run-batch` on the fake engine: one response a line, in any state of the file, whatever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers.batch_files import (
    drop_creation,
    make_chat,
    make_completion,
    make_numbered_requests,
    read_responses,
    write_batch,
)
from helpers.jobs import Launcher, run_each_command, wait_for
from helpers.results import count_journal_bytes

from dpgen.journal.format import parse_name
from dpgen.output.verification import verify

FAKE = ("--model", "none", "run.engine=fake")

# Runs `dpgen run-batch` with each list of arguments, one after the other in one process.
EACH_IN_TURN = """
import contextlib, io, json, sys
from dpgen.cli import main

for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main(["run-batch", *arguments])
    print("REPORT " + json.dumps([status, stderr.getvalue()]), flush=True)
"""


def test_every_line_of_a_bad_file_gets_a_response_in_its_place(launcher: Launcher, tmp_path: Path) -> None:
    lines = [
        make_chat("same"),
        make_chat("same", "again"),
        make_completion("text", logprobs=2),
        '{"custom_id": "broken", "method": "POST", ',
        "",
        "not JSON at all",
        make_chat("long", "x" * (1 << 20)),
        make_chat("samples", n=3, logprobs=True, top_logprobs=2),
        json.dumps({"custom_id": "elsewhere", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}),
        make_chat("unicode \u2028 é", "é\u2028"),
        json.dumps({"custom_id": "list", "method": "POST", "url": "/v1/chat/completions", "body": []}),
        make_chat("last"),
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # no line feed at the end
    job = launcher.dpgen("run-batch", "-i", str(source), "-o", str(out), *FAKE)
    assert job.wait() == 0, job.output
    responses = read_responses(out)
    assert [(response["custom_id"], response["response"]["status_code"]) for response in responses] == [
        *(("same", 200), ("same", 200), ("text", 200), ("broken", 400), (None, 400), ("long", 400), ("samples", 200)),
        *(("elsewhere", 400), ("unicode \u2028 é", 200), ("list", 400), ("last", 200)),
    ]
    assert len({response["id"] for response in responses}) == len(responses)
    types = [response["error"]["error"]["error_type"] for response in responses if response["error"]]
    assert types == ["bad_request", "bad_request", "prompt_too_long", "unsupported_request", "bad_request"]
    assert verify(Path(f"{out}.run")).verdict == "sound"
    assert not list(tmp_path.glob(".*")), "the temporary file is gone"


def test_responses_that_were_removed_are_written_again_and_not_generated(launcher: Launcher, tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", make_numbered_requests(5))
    out = tmp_path / "out.jsonl"
    command = ("run-batch", "-i", str(source), "-o", str(out), *FAKE)
    assert launcher.dpgen(*command).wait() == 0
    before, num_bytes = read_responses(out), count_journal_bytes(Path(f"{out}.run"))
    shutil.rmtree(f"{out}.run/dataset")
    out.unlink()
    again = launcher.dpgen(*command)
    assert again.wait() == 0, again.output
    assert read_responses(out) == before and count_journal_bytes(Path(f"{out}.run")) == num_bytes


@pytest.mark.slow
@pytest.mark.multi
def test_a_killed_command_goes_on_and_answers_nothing_twice(launcher: Launcher, tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", make_numbered_requests(300))
    out, undisturbed = tmp_path / "out.jsonl", tmp_path / "undisturbed.jsonl"
    command = ("run-batch", "-i", str(source), *FAKE)
    assert launcher.dpgen(*command, "-o", str(undisturbed)).wait() == 0
    job = launcher.dpgen(*command, "-o", str(out), "engine.step_s=0.02")
    wait_for(lambda: count_journal_bytes(Path(f"{out}.run")) > 2_000)
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()
    assert not out.exists(), "there is no response file in part"
    again = launcher.dpgen(*command, "-o", str(out), ranks=2)
    assert again.wait() == 0, again.output
    assert "attempt 2" in again.output
    assert list(map(drop_creation, read_responses(out))) == list(map(drop_creation, read_responses(undisturbed)))
    keys = [parse_name(path.name) for path in Path(f"{out}.run").glob("journal/*.journal")]
    assert {key[0] for key in keys if key} == {1, 2}, "both attempts have answered some lines"
    out.unlink()
    once_more = launcher.dpgen(*command, "-o", str(out))
    assert once_more.wait() == 0, once_more.output
    assert "finished result already" in once_more.output and out.exists()


def test_responses_are_written_though_no_line_could_be_answered(launcher: Launcher, tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", ["broken", '{"custom_id": "a"}'])
    job = launcher.dpgen("run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), *FAKE)
    assert job.wait() == 1
    assert "no row succeeded" in job.output
    assert [response["custom_id"] for response in read_responses(tmp_path / "out.jsonl")] == [None, "a"]


def test_commands_that_can_not_run_say_so_before_anything_starts(launcher: Launcher, tmp_path: Path) -> None:
    source = str(write_batch(tmp_path / "in.jsonl", make_numbered_requests(2)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x"}\n')
    (tmp_path / "folder").mkdir()
    out = str(tmp_path / "out.jsonl")
    cases: list[tuple[list[str], str]] = [
        (["-o", out, *FAKE], "run-batch needs the batch file and the response file"),
        (["-i", source, "-o", out, *FAKE, "--max-modle-len", "3"], "did you mean --max-model-len?"),
        (["-i", source, "-o", source, *FAKE], "is the batch file itself"),
        (["-i", source, "-o", str(tmp_path / "folder"), *FAKE], "must be a file"),
        (
            ["-i", source, "-o", f"{out}.run/x.jsonl", "--run-dir", f"{out}.run", *FAKE],
            "must not be in the run directory",
        ),
        (["-i", source, "-o", "/proc/none/out.jsonl", "--run-dir", f"{out}.run", *FAKE], "can't be written"),
        (["-i", str(tmp_path / "none.jsonl"), "-o", out, *FAKE], "none.jsonl"),
        (["-i", source, "-o", out, "run.engine=fake"], "missing: model"),
        (["-i", source, "-o", out, *FAKE, "output.explode=true"], "output.explode has no effect"),
    ]
    reports = run_each_command(launcher, EACH_IN_TURN, [arguments for arguments, _ in cases])
    for (arguments, words), (status, output) in zip(cases, reports, strict=True):
        assert status == 2, (arguments, output)
        assert words in output, arguments
        assert output.count("dpgen: error") == 1 and "Traceback" not in output
