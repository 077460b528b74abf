"""Test how many workers prepare a rank's media, and what they are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dpgen.config.loader import load
from dpgen.engine.messages import EngineSpec
from dpgen.engine.starting.media_workers import build_media_preparer, count_workers
from dpgen.workers.keeper import WorkerKeeper
from dpgen.workers.pool import WorkerSpec


@pytest.mark.parametrize(
    ("num_cores", "num_own", "local_size", "count"),
    [
        (2, 2, 1, 1),  # none is left beside the rank and its engine
        (6, 6, 1, 4),
        (64, 64, 8, 6),
        (64, 8, 8, 6),  # the launcher has bound each rank to its cores
        (256, 256, 8, 8),
        (4, 4, 8, 1),
    ],
)
def test_workers_take_the_cores_that_rank_and_engine_leave(
    num_cores: int, num_own: int, local_size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_own)))
    assert count_workers("auto", local_size) == count
    assert count_workers(3, local_size) == 3


class RecordingKeeper(WorkerKeeper):
    """Record what workers are asked for, and start none."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: list[WorkerSpec] = []

    def take(self, spec: WorkerSpec, log: Any) -> Any:
        self.specs.append(spec)


def test_a_template_s_file_that_has_changed_asks_for_other_workers(tmp_path: Path) -> None:
    template, keeper = tmp_path / "template.jinja", RecordingKeeper()
    (tmp_path / "data.jsonl").write_text('{"c": []}\n')
    arguments = ["run.dir=r", "model=m", f"data.path={tmp_path}/data.jsonl", "data.messages_column=c"]
    config = load([], [*arguments, f"data.chat_template={template}"])
    for text in ("{{ messages }}", "{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        build_media_preparer(config, EngineSpec("vllm", "m"), 1, print, keeper).start()
    first, same, other = keeper.specs
    assert first == same != other
