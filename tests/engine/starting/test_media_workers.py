"""Test how many workers prepare a rank's media."""

from __future__ import annotations

import os

import pytest

from dpgen.engine.starting.media_workers import count_workers


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
