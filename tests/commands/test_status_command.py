"""The command line of `dpgen status`; tests/monitoring/status tests what it shows."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.jobs import REPO
from helpers.status_files import StatusFiles

from dpgen.cli import main
from dpgen.monitoring.status.record import identify_process, write_record

FIELDS = {
    *("version", "run_dir", "state", "exit_status", "reason", "attempt", "num_ranks", "num_rows", "num_done"),
    *("num_errors", "num_generated_tokens", "tokens_per_s", "rows_per_s", "time_left", "prefix_cache_fraction"),
    *(
        "num_preemptions",
        "num_engine_restarts",
        "num_calls",
        "num_engines",
        "errors",
        "waits_for",
        "stragglers",
        "ranks",
        "notes",
    ),
}
RANK_FIELDS = {"rank", "host", "state", "phase", "phase_s", "pid", "reason", "counts"}


@pytest.fixture
def live_run(tmp_path: Path) -> Path:
    """Return a run directory in which this process is rank 0."""
    files = StatusFiles(tmp_path / "run")
    record = files.write(0, run={"num_rows": 1000, "num_done": 400, "num_unclaimed": 1})
    write_record(tmp_path / "run" / "status", dataclasses.replace(record, process=identify_process()))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: RUN_DIR"),
        (["a", "b"], "unexpected argument 'b'"),
        (["--wach", "a"], "unknown option --wach, did you mean --watch?"),
        (["no/such/directory"], "RUN_DIR=no/such/directory: there is no such directory"),
        (["."], "RUN_DIR=.: holds no run"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out, output


def test_help_names_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--help"]) == 0
    output = capsys.readouterr().out
    assert "--watch" in output and "exit status: 0 starting, live or finished; 75 stopped but resumable" in output


def test_json_has_the_documented_fields(live_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(live_run), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status.keys() == FIELDS, "fields may be added (here, too); removing one or its meaning needs a new version"
    assert status["ranks"][0].keys() == RANK_FIELDS and status["version"] == 1
    assert (status["state"], status["num_done"], status["num_rows"]) == ("live", 400, 1000)


def test_the_page_shows_the_run_and_each_rank(live_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(live_run)]) == 0
    output = capsys.readouterr().out
    assert f"{live_run}: live, attempt 1\n  rows      400 of 1,000 done (40 %)\n" in output
    assert re.search(r"^ +0  \S+ +live +generating 0 s ", output, re.MULTILINE), output


@pytest.mark.parametrize("arguments", [["--watch"], ["--watch", "--json"]])
def test_watch_shows_a_page_again_and_again_until_ctrl_c(arguments: list[str], live_run: Path) -> None:
    """In a terminal of its own; the page is drawn twice, and the last one stays."""
    test_end, process_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dpgen", "status", str(live_run), *arguments],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "TERM": "xterm", "COLUMNS": "160", "LINES": "24"},
        stdin=process_end,
        stdout=process_end,
        stderr=process_end,
        start_new_session=True,
    )
    os.close(process_end)
    try:
        seen = b""
        page = b'"num_done": 400' if "--json" in arguments else b"400 of 1,000 done"
        while seen.count(page) < 2:
            seen += os.read(test_end, 1 << 16)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(test_end)


def test_watch_ends_with_a_finished_run(live_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (live_run / "status").iterdir():
        path.unlink()
    (live_run / "_SUCCESS").write_text('{"num_rows": 7, "errors": {}}')
    assert main(["status", str(live_run), "--watch"]) == 0
    assert "finished" in capsys.readouterr().out
