"""Whole jobs from a bucket to a bucket, over S3's protocol on loopback."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.jobs import Launcher
from helpers.stores import ACCESS_KEY, SECRET_KEY, S3Server, serve_s3, to_lines

from dpgen.errors import EXIT_OK


@pytest.fixture
def server() -> Iterator[S3Server]:
    with serve_s3("bucket") as server:
        for number in range(2):
            server.file_system.pipe(f"bucket/rows/{number}.jsonl", to_lines([f"{number} {row}" for row in range(4)]))
        yield server


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_killed_while_it_uploads_continues_the_upload_elsewhere(
    server: S3Server, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["run", f"run.dir={run}", "run.engine=fake", "model=fake", "data.path=s3://bucket/rows/*.jsonl"]
    arguments += ["data.prompt_column=prompt", "output.to=s3://bucket/out", "output.rows_per_file=2"]
    arguments.append(f"data.storage_options={{key: {ACCESS_KEY}, secret: {SECRET_KEY}}}")
    server.held = "out/train-00002-of"
    first = launcher.dpgen(*arguments, f"data.cache_dir={tmp_path / 'a'}", ranks=2, **server.environment)
    assert server.is_held.wait(240), first.output
    os.killpg(first.process.pid, signal.SIGKILL)
    first.wait()
    assert server.count("GET", "/bucket/rows/0.jsonl") == 1, "one rank of the node fetches"
    assert (run / "_SUCCESS").exists() and not server.file_system.exists("bucket/out/_SUCCESS")
    server.held = ""
    server.release.set()
    journal = {path.name: path.stat().st_mtime_ns for path in (run / "journal").iterdir()}
    again = launcher.dpgen(*arguments, f"data.cache_dir={tmp_path / 'b'}", **server.environment)
    assert again.wait() == EXIT_OK, again.output
    assert {path.name: path.stat().st_mtime_ns for path in (run / "journal").iterdir()} == journal, "nothing generated"
    names = [name for name in server.list_names("bucket/out") if name.startswith(("train", "_"))]
    assert names == ["_SUCCESS", *(f"train-{number:05}-of-00004.parquet" for number in range(4))]
    for path in (path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert SECRET_KEY.encode() not in content and ACCESS_KEY.encode() not in content, path
    assert SECRET_KEY not in first.output + again.output


@pytest.mark.slow
def test_run_batch_reads_and_writes_addresses(server: S3Server, launcher: Launcher, tmp_path: Path) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}) for name in "ab"
    ]
    server.file_system.pipe("bucket/in.jsonl", "\n".join(lines).encode())
    job = launcher.dpgen(
        *("run-batch", "-i", "s3://bucket/in.jsonl", "-o", "s3://bucket/out.jsonl", "--model", "fake"),
        *("--run-dir", str(tmp_path / "run"), "run.engine=fake", f"data.cache_dir={tmp_path / 'cache'}"),
        **server.environment,
    )
    assert job.wait() == EXIT_OK, job.output
    answers = [json.loads(line) for line in server.file_system.cat("bucket/out.jsonl").splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["a", "b"]
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
