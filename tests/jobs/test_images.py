"""Whole runs over rows with images, on the fake engine: bad images cost their rows, and none is mixed up.

The fake engine fails on a row whose image in the shared memory is not the one that its prompt was made of.
"""

from __future__ import annotations

import base64
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO, Launcher, WriteConfig, find_engine_pids, load_result, wait_for
from helpers.results import count_journal_bytes
from helpers.tiny_vision import make_image

pytestmark = pytest.mark.multi

PATHS = f"{REPO}:{REPO / 'tests'}"


def make_rows(count: int, bad: dict[int, str] | None = None) -> list[dict[str, Any]]:
    """Return rows with an image each; every third has none, and two neighbours share theirs."""
    rows: list[dict[str, Any]] = []
    for row in range(count):
        data = base64.b64encode(make_image(row // 2, (20 + row // 2, 16))).decode()
        image = None if row % 3 == 2 else f"data:image/png;base64,{data}"
        rows.append({"prompt": f"number {row}.", "image": (bad or {}).get(row, image)})
    return rows


def run(launcher: Launcher, conf: str, *arguments: str, ranks: int = 1) -> str:
    job = launcher.dpgen("run", conf, *arguments, ranks=ranks, PYTHONPATH=PATHS)
    assert job.wait() == 0, job.output
    return job.output


def list_errors(rows: list[dict[str, Any]]) -> dict[int, str]:
    return {row["row_id"]: row["error"]["type"] for row in rows if row["error"]}


@pytest.mark.slow
def test_an_image_that_is_broken_or_breaks_its_worker_costs_its_row_and_the_engine_s_death_none(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    (tmp_path / "faults").mkdir()
    conf = write_config(
        make_rows(24, {3: "data:image/png;base64,AAAA", 6: "missing.png"}),
        data={"images_column": "image", "render_timeout_s": 1, "media_workers": 2},
        engine={
            **{"prepare_crash_on": "number 9.", "prepare_hang_on": "number 12.", "max_num_seqs": 4, "step_s": 0.002},
            **{"crash_on": "number 16.", "max_faults": 1, "fault_dir": str(tmp_path / "faults")},
        },
        check={"function": "helpers.row_checks:fail_sometimes", "max_attempts": 20},
    )
    output = run(launcher, conf)
    rows = load_result(tmp_path / "run")
    errors = {3: "media_invalid", 6: "media_missing", 9: "render_crashed", 12: "render_timeout"}
    assert list_errors(rows) == errors, "retries and the engine's second life send what is prepared"
    assert "preparing media in 2 workers" in output and "engine restarted" in output
    assert len(rows) == 24
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output


@pytest.mark.slow
def test_large_images_go_through_little_memory_though_each_engine_keeps_one_as_its_witness(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    limit, sizes = 1 << 20, {3: (640, 900), 9: (640, 900)}  # 1.7 MB, where all others together may take 1 MiB
    images = [make_image(row, sizes.get(row, (460, 460))) for row in range(14)]  # 0.6 MB
    data = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    conf = write_config(
        [{"prompt": f"number {row}.", "image": text} for row, text in enumerate(data)],
        data={"images_column": "image", "media_workers": 1, "max_held_bytes": limit},
        engine={"max_num_seqs": 4, "step_s": 0.002},
    )
    run(launcher, conf)
    assert [row["error"] for row in load_result(tmp_path / "run")] == [None] * 14


@pytest.mark.slow
def test_a_run_that_is_killed_gives_the_same_texts_at_another_world_size(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        make_rows(90),
        data={"images_column": "image", "media_workers": 2},
        engine={"step_s": 0.01, "max_num_seqs": 8, "prepare_s": 0.01},
        sampling={"max_tokens": 6},
    )
    job = launcher.dpgen("run", conf)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 2000)
    [engine] = find_engine_pids(job)
    os.kill(engine, signal.SIGKILL)
    wait_for(lambda: "engine restarted" in job.output)
    job.end()
    run(launcher, conf, "engine.step_s=0", ranks=2)
    rows = load_result(tmp_path / "run")
    run(launcher, conf, "engine.step_s=0", "engine.prepare_s=0", f"run.dir={tmp_path / 'undisturbed'}")
    assert rows == load_result(tmp_path / "undisturbed")
    assert not list_errors(rows)


def test_calls_of_programs_have_images(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    rows = [row for row in make_rows(9, {4: "data:image/png;base64,AAAA"}) if row["image"]]
    conf = write_config(
        rows, data={"prompt_column": None}, program={"function": "helpers.programs:look_twice"}, sampling={"n": 1}
    )
    run(launcher, conf)
    results = load_result(tmp_path / "run")
    assert len(list_errors(results)) == 1, "the program sees a broken image as the call's error"
    answers = [json.loads(row["program"]) for row in results if not row["error"]]
    assert len(answers) == 5 and all(answer["first"] != answer["second"] for answer in answers)
