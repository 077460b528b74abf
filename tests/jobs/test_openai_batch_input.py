"""Jobs whose input is an OpenAI batch file, on the fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.jobs import Launcher, load_result, read_run_json


def make_line(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> str:
    body = {"messages": [{"role": "user", "content": "hello"}], **body} if "prompt" not in body else body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def test_each_line_of_a_batch_file_is_answered_or_gets_its_own_error(launcher: Launcher, tmp_path: Path) -> None:
    lines = [
        make_line("a", max_tokens=5),
        "garbage {",
        "",
        make_line("b", max_completion_tokens=7, n=2),
        make_line("b", "/v1/completions", prompt="abc"),
        make_line("c", model="gpt-4o"),
        make_line("d", model="math", logprobs=True, top_logprobs=2, max_tokens=2),
        make_line("e", n=0),
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    arguments = [f"data.path={tmp_path / 'in.jsonl'}", "data.columns=[custom_id]", f"run.dir={tmp_path / 'run'}"]
    arguments += ["model=/models/base", "run.engine=fake", "lora={math: x, code: y}"]
    job = launcher.dpgen("run", *arguments)
    assert job.wait() == 0, job.output
    assert "1 line that can't be answered" in job.output and "1 custom_id on more than one line" in job.output
    results = load_result(tmp_path / "run")
    assert [row["custom_id"] for row in results] == ["a", None, "b", "b", "c", "d", "e"]
    assert "request" not in results[0]
    errors = [row["error"] and row["error"]["type"] for row in results]
    assert errors == [None, "bad_request", None, None, "unknown_model", None, "bad_request"]
    assert [row["num_generated_tokens"] for row in results] == [[5], None, [7, 7], [16], None, [2], None]
    assert results[5]["generated_text"][0].startswith("math ")
    assert len(results[5]["top_logprobs"][0]) == 4 and results[0]["top_logprobs"] == [None]
    again = launcher.dpgen("run", *arguments, "data.format=openai_batch")
    assert again.wait() == 0 and "already" in again.output, "what auto has found is the same run"


def test_samples_that_fail_a_check_are_generated_again_one_by_one(launcher: Launcher, tmp_path: Path) -> None:
    lines = [make_line(str(number), max_tokens=7, n=2, seed=number) for number in range(30)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    job = launcher.dpgen(
        *("run", f"data.path={tmp_path / 'in.jsonl'}", f"run.dir={tmp_path / 'run'}", "model=/models/base"),
        *("run.engine=fake", "check.regex=^[0-7]", "check.max_attempts=30", "check.retry_sampling.max_tokens=9"),
    )
    assert job.wait() == 0, job.output
    rows = load_result(tmp_path / "run")
    assert all(row["error"] is None and len(row["generated_text"]) == 2 for row in rows)
    assert all(text[0] in "01234567" for row in rows for text in row["generated_text"])
    num_tokens = [count for row in rows for count in row["num_generated_tokens"]]
    [manifest] = read_run_json(tmp_path / "run")["manifests"]
    assert set(num_tokens) == {7, 9} and manifest["num_retries"]["regex"] >= num_tokens.count(9)
