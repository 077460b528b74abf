"""Two engines on a rank with real vLLM (its CPU build): the texts of one, also where one is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Launcher, WriteConfig, find_engine_pids, load_result, read_run_json, wait_for
from helpers.tiny_model import ENGINE, save_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.multi, pytest.mark.slow]

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "hello",
    "world",
    "there",
    "user",
    "tool",
    "system",
]
NUM_ROWS = 600


def make_rows() -> list[dict[str, Any]]:
    """Return rows that share beginnings, greedy and sampled ones, all but a few of them long."""
    rows = []
    for index in range(NUM_ROWS):
        words = [WORDS[(index // 4 + step) % len(WORDS)] for step in range(8)] + [str(index)]
        length = 200 if index % 10 else 20
        rows.append({"prompt": " ".join(words), "temperature": 0.9 if index % 2 else 0.0, "max_tokens": length})
    return rows


def test_an_engine_killed_in_the_middle_changes_no_text(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        make_rows(),
        run={"engine": "vllm"},
        model=str(save_tiny_model(tmp_path / "model")),
        engine=ENGINE,
        sampling={"ignore_eos": True, "from_columns": {"temperature": "temperature", "max_tokens": "max_tokens"}},
    )
    run_dir = tmp_path / "run"
    job = launcher.dpgen("run", conf, "parallel.engines_per_rank=2")
    record = run_dir / "status" / "rank-0.json"

    def are_both_ready() -> bool:
        assert job.process.poll() is None, f"the job ended before both engines generated:\n{job.output}"
        return record.exists() and json.loads(record.read_text())["counts"].get("num_engines") == 2

    wait_for(are_both_ready)
    os.kill(find_engine_pids(job)[0], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert job.output.count("was killed by SIGKILL, restarting it") == 1
    metadata = read_run_json(run_dir)
    assert metadata["engines_per_rank"]["number"] == 2
    assert metadata["engine"]["kv_cache_bytes"] == ENGINE["kv_cache_memory_bytes"] // 2, "two divide what one has"
    one = launcher.dpgen("run", conf, f"run.dir={tmp_path / 'one'}")
    assert one.wait() == 0, one.output
    assert "1 engine a rank: the model runs on the processor itself" in one.output
    rows, expected = load_result(run_dir), load_result(tmp_path / "one")
    assert [row["row_id"] for row in rows] == list(range(NUM_ROWS))
    assert rows == expected
