"""Rank 0 decides how many sequences run, the other ranks follow it, and what is measured is on the disk at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dpgen.distributed.group import InMemoryStore
from dpgen.scheduling.generation_loop import LoopConfig
from dpgen.scheduling.progress.throughput import UNKNOWN_RATE
from dpgen.scheduling.progress.totals import Totals
from dpgen.tuning.probe import TrialProbe
from dpgen.tuning.trial import Budget, TrialPlan, read_trial


class FakeEngine:
    max_num_seqs = 64
    is_abandoned = False
    num_ready = 1
    has_joined_all = True

    def submit(self, requests: list[Any]) -> None:
        raise AssertionError("no rows")

    def poll(self, timeout_s: float) -> list[Any]:
        return []


class FakeGroup:
    """Two ranks of a group share a store."""

    size, num_shrinks = 2, 0

    def __init__(self, store: InMemoryStore) -> None:
        self.checked_store = store


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_totals(second: int, rate: int, **fields: Any) -> Totals:
    num_tokens = second * rate
    totals = Totals(num_rows=num_tokens // 20, num_generated_tokens=num_tokens, num_unclaimed=10_000)
    return dataclasses.replace(totals, rates=(rate // 2, rate // 2), **fields)


def make_probes(folder: Path, clock: Clock, engine: FakeEngine, **plan: Any) -> list[TrialProbe]:
    store: InMemoryStore = InMemoryStore()
    found = TrialPlan(1, base_limit=16, budget=Budget(seconds=500), folder=str(folder), started_s=90.0, **plan)
    probes = [TrialProbe(found, rank, clock, clock) for rank in range(2)]
    for probe in probes:
        probe.adapt(engine, FakeGroup(store), LoopConfig(), lambda: None)  # type: ignore[arg-type]
        probe.begin(100_000)
    return probes


def test_the_other_ranks_run_as_many_sequences_as_rank_0_says(tmp_path: Path) -> None:
    clock = Clock()
    leader, follower = make_probes(tmp_path, clock, FakeEngine())
    limits = []
    for second in range(200):
        clock.now_s += 1
        rate = 100 * (leader._engine.limit or 64)
        leader.update(make_totals(second, rate))
        follower.update(make_totals(second, rate))
        limits.append(follower._engine.limit)
        if leader.stop_reason is not None:
            break
    assert list(dict.fromkeys(limits)) == [16, 32, 64]
    assert follower._engine.max_num_seqs == 64
    found = read_trial(tmp_path, 1)
    assert found is not None
    assert [stage.max_num_seqs for stage in found.stages] == [16, 32, 64]
    assert (found.num_ranks, found.num_engines, found.start_s, found.num_remaining) == (2, 2, 10.0, 100_000)
    assert leader.stop_reason == "trial 1 has ended: measured"


def test_nothing_is_measured_while_engines_are_joining(tmp_path: Path) -> None:
    clock, engine = Clock(), FakeEngine()
    engine.has_joined_all = False
    [leader, _] = make_probes(tmp_path, clock, engine)
    for second in range(30):
        clock.now_s += 1
        leader.update(make_totals(second, 1000))
    assert leader._engine.limit is None and read_trial(tmp_path, 1) is None
    engine.has_joined_all, engine.num_ready, engine.max_num_seqs = True, 3, 192
    clock.now_s += 1
    leader.update(make_totals(31, 1000))
    assert leader._engine.limit == 16
    assert leader._engine.max_num_seqs == 48, "16 for each of three engines"


def test_a_run_whose_rows_run_out_is_left_to_finish(tmp_path: Path) -> None:
    clock = Clock()
    [leader, _] = make_probes(tmp_path, clock, FakeEngine())
    for second in range(5):
        clock.now_s += 1
        leader.update(make_totals(second, 1000, num_unclaimed=0 if second == 4 else 5))
    assert leader.stop_reason is None
    found = read_trial(tmp_path, 1)
    assert found is not None and found.reason == "the rows ran out"


def test_no_more_sequences_run_before_the_first_totals_than_are_measured_first(tmp_path: Path) -> None:
    engine: Any = FakeEngine()
    for probe in make_probes(tmp_path, Clock(), engine):
        assert probe._engine.max_num_seqs == 16
    engine.is_counting = True
    for probe in make_probes(tmp_path, Clock(), engine):
        assert probe._engine.max_num_seqs == 64, "full, while it is measured how many engines pay"


def test_a_trial_that_loses_a_rank_fails_and_says_which(tmp_path: Path) -> None:
    clock = Clock()
    [leader, _] = make_probes(tmp_path, clock, FakeEngine())
    for second in range(3):
        clock.now_s += 1
        totals = dataclasses.replace(make_totals(second, 1000), num_ranks_without_engine=second // 2)
        leader.update(dataclasses.replace(totals, rates=(500, UNKNOWN_RATE)))
    error = f"rank 1 has no engine any more: it died too often, see {tmp_path.parent}/logs"
    assert leader.stop_reason == f"trial 1 has ended: {error}"
    found = read_trial(tmp_path, 1)
    assert found is not None and found.error == error
