"""What a user sees of an input: bad rows that fail alone, and files that changed under the same name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.jobs import EACH_IN_TURN, Launcher, WriteConfig, load_result, run_each_command

from dpgen.output.verification import verify

pytestmark = pytest.mark.multi


@pytest.mark.slow
def test_rows_fail_alone_and_replaced_files_are_noticed(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    folder, run = tmp_path / "input", tmp_path / "run"
    folder.mkdir()
    path = folder / "train.jsonl"
    lines = [
        b'{"prompt": "one", "at": "2024-05-06"}',
        b'{"prompt": "caf\xe9"}',
        b'{"prompt": "\\ud83d", "n": [1, "x"]}',
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    conf = write_config([], data={"path": str(folder)})
    [[status, output]] = run_each_command(launcher, EACH_IN_TURN, [[conf]])
    assert status == 0, output
    assert "read 1 json file, 3 rows, 3 columns (used: prompt); 2 rows with text that is not valid Unicode" in output
    rows = load_result(run)
    assert [(row["error"] or {"type": None})["type"] for row in rows] == [None, "invalid_text", "invalid_text"]
    assert (rows[0]["at"], rows[1]["prompt"], rows[2]["prompt"]) == ("2024-05-06", "caf\\udce9", "\\ud83d")
    assert verify(run).verdict == "sound"

    status_before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"one", b"two"))
    os.utime(path, ns=(status_before.st_atime_ns, status_before.st_mtime_ns))
    assert verify(run).verdict == "not sound"
    (tmp_path / "variable.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n")
    reports = run_each_command(
        launcher, EACH_IN_TURN, [[conf], [conf, f"run.dir={folder / 'run'}"], [conf, f"data.path={tmp_path}"]]
    )
    assert [status for status, _ in reports] == [2, 2, 2]
    assert "holds results of another input: input.content: " in reports[0][1]
    assert "is inside data.path" in reports[1][1]
    assert "is inside data.path" in reports[2][1]
