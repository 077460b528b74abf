"""The closing lines say how near a run came to its bound, and nothing where that is not known."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.distributed.group import SingleRankGroup
from dpgen.monitoring.efficiency import gather_efficiency
from dpgen.monitoring.run_report import summarize_run
from dpgen.records import RankManifest
from dpgen.scheduling.progress.step_times import RankSpeed, RunEfficiency, StepSamples


def measure(lengths: list[int], generation_s: float, **sampling: Any) -> RunEfficiency | None:
    samples = StepSamples()
    for seqs in [1, 64, 128, 256] * 10:
        samples.add(seqs, 6e-3 + 30e-6 * seqs)
    data = DataConfig(path="x", prompt_column="x")
    config = Config(RunConfig(dir="x"), data, "model", sampling=sampling)
    speed = RankSpeed(samples, lengths, [1.0] * len(lengths), 256)
    return gather_efficiency(SingleRankGroup(), config, speed, generation_s)


def test_the_efficiency_stands_beside_the_balance() -> None:
    efficiency = measure([250] * 6000, 84.0)
    assert efficiency is not None
    manifests = [RankManifest(rank, "node", busy_s=20.0) for rank in range(2)]
    balance, line = summarize_run(manifests, efficiency)
    assert balance.endswith("balance 1.00 (mean over longest)")
    assert (
        line
        == "efficiency 0.95 of the bound: with steps of 6 ms and 30 us a sequence, these rows take 1 min 20 s or more"
    )


def test_a_longest_row_that_bounds_the_run_is_named() -> None:
    efficiency = measure([4000, *[10] * 500], 30.0)
    [line] = summarize_run([RankManifest(0, "node", busy_s=30.0)], efficiency)
    assert line.startswith("efficiency 0.8") and line.endswith(", since the longest row alone takes 24 s")


def test_steps_that_are_known_of_full_engines_alone_are_told_by_the_sequence() -> None:
    efficiency = RunEfficiency(40.0, 50.0, 1.0, 0.0, 2.5e-3, 8)
    [line] = summarize_run([RankManifest(0, "node", busy_s=30.0)], efficiency)
    assert line == "efficiency 0.80 of the bound: with steps of 2.5 ms a sequence, these rows take 40 s or more"


@pytest.mark.parametrize(("generation_s", "sampling"), [(9.0, {}), (60.0, {"n": 2})])
def test_short_runs_and_rows_with_several_samples_have_no_efficiency(
    generation_s: float, sampling: dict[str, Any]
) -> None:
    assert measure([250] * 6000, generation_s, **sampling) is None
