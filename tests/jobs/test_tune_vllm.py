"""`dpgen tune` on real vLLM (its CPU build)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.jobs import REPO, Launcher

from dpgen.cli import main
from dpgen.journal.reader import index_journal

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_numbers_of_sequences_are_measured_on_a_real_engine(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((REPO / "conf" / "demo" / "questions.jsonl").read_text() * 20)
    demo, overlay, run_dir = str(REPO / "conf" / "demo.yaml"), tmp_path / "tuned.yaml", tmp_path / "run"
    own = [f"model={REPO}/conf/demo/model", f"data.path={rows}", f"run.dir={run_dir}", "engine.max_num_seqs=8"]
    job = launcher.dpgen("tune", demo, *own, "--budget", "40s", "--output", str(overlay), "--json")
    assert job.wait() == 0, job.output
    shown = json.loads(job.output.splitlines()[-1])
    assert shown["trials"][0]["tokens_per_s"] > 0
    assert len(index_journal(run_dir / "journal")) >= shown["num_rows_done"] > 0
    assert main(["config", demo, str(overlay), *own[:3]]) == 0
    assert f"max_num_seqs: {shown['best']['engine.max_num_seqs']}" in capsys.readouterr().out
