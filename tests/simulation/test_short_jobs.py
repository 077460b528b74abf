"""Short jobs end near the time that no schedule can beat: in virtual time, on four ranks with 8 billion parameters."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from helpers.jobs import REPO

from dpgen.config.sections import WorkConfig
from dpgen.scheduling.order import RowOrder
from dpgen.simulation.lengths import sample_lengths
from dpgen.simulation.simulator import EngineCostModel, SimulationResult, Workload, simulate

MODEL = EngineCostModel(6e-3, 29e-6)  # 13.4 ms for 256 sequences, as measured on an H100
WITH_CONTEXT = EngineCostModel(6e-3, 11e-6, 52e-9, 23e-6)  # as `dpgen simulate --calibrate` found it there
CONSTANT_STEPS = EngineCostModel(13e-3, 0.0)


@functools.cache
def sample(kind: str) -> np.ndarray:
    """Return the lengths of six waves: chat-like (longest 2,002), or reasoning-like (longest about 3,000)."""
    if kind == "chat":
        return sample_lengths("lognormal:205:0.7", 6000).clip(1, 2048)
    lengths = sample_lengths(str(REPO / "benchmarks" / "reasoning_output_lengths.json"), 6000)
    scaled: np.ndarray = (lengths * 3500 // 32768).clip(1)
    return scaled


def run(
    lengths: np.ndarray,
    model: EngineCostModel = MODEL,
    *,
    noise: float = 0.0,
    start_s: dict[int, float] | None = None,
    slowdown: dict[int, float] | None = None,
    is_planned: bool = True,
) -> SimulationResult:
    hints = lengths * np.random.default_rng(1).lognormal(0.0, noise, len(lengths))
    rows = np.argsort(-hints, kind="stable")
    order = RowOrder(rows, "longest_first", lengths=hints[rows].astype(np.float32))
    if not is_planned:
        order = dataclasses.replace(order, lengths=None)
    workload = Workload(lengths, np.full(len(lengths), 20), order)
    return simulate(model, workload, 4, WorkConfig(), slowdown, start_s)


@pytest.mark.parametrize(("kind", "before"), [("chat", 0.85), ("reasoning", 0.75)])
def test_six_waves_come_near_the_bound(kind: str, before: float) -> None:
    assert run(sample(kind)).efficiency > 0.93
    assert run(sample(kind), is_planned=False).efficiency < before


@pytest.mark.parametrize("kind", ["chat", "reasoning"])
def test_so_do_six_waves_where_long_rows_slow_their_steps_down(kind: str) -> None:
    assert run(sample(kind), WITH_CONTEXT).efficiency > 0.92


@pytest.mark.parametrize(
    "lengths",
    [[1000, 1, 1], [1000] + [1] * 100, [2000, 1000], [4000, 4000, 10, 10, 10], [500] * 11 + [50] * 50, [7], []],
)
def test_a_handful_of_rows_is_planned_too(lengths: list[int]) -> None:
    result = run(np.array(lengths, dtype=np.int64))
    assert result.wall_s <= 1.6 * MODEL.step_s * max(lengths, default=0) + 1


@pytest.mark.parametrize("kind", ["chat", "reasoning"])
def test_late_ranks_cost_no_more_than_their_delay(kind: str) -> None:
    result = run(sample(kind), start_s={0: 2.0, 2: 0.5})
    assert (result.bound_s + 2.5 / 4) / result.wall_s > 0.91


def test_one_giant_row_is_finished_beside_few_others() -> None:
    lengths = np.append(np.full(5000, 100), 3000)
    assert run(lengths).efficiency > 0.95 > 0.85 > run(lengths, is_planned=False).efficiency


def test_equal_rows_need_no_plan() -> None:
    lengths = np.full(4 * 6 * 256, 250)
    assert run(lengths).wall_s == run(lengths, is_planned=False).wall_s


@pytest.mark.parametrize("kind", ["chat", "reasoning"])
def test_a_wrong_guess_of_what_steps_cost_does_no_harm(kind: str) -> None:
    planned, before = run(sample(kind), CONSTANT_STEPS), run(sample(kind), CONSTANT_STEPS, is_planned=False)
    assert planned.wall_s < 1.01 * before.wall_s


@pytest.mark.parametrize("kind", ["chat", "reasoning"])
@pytest.mark.parametrize("noise", [0.3, 0.6])
def test_wrong_hints_do_no_harm(kind: str, noise: float) -> None:
    planned, before = run(sample(kind), noise=noise), run(sample(kind), noise=noise, is_planned=False)
    assert planned.wall_s < 1.03 * before.wall_s


@pytest.mark.parametrize("kind", ["chat", "reasoning"])
def test_a_slow_rank_does_no_more_harm_than_without_a_plan(kind: str) -> None:
    planned = run(sample(kind), slowdown={1: 1.5})
    assert planned.wall_s < 1.03 * run(sample(kind), slowdown={1: 1.5}, is_planned=False).wall_s


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
@pytest.mark.parametrize("start_s", [{}, {1: 1.0, 2: 1.5, 3: 2.0}], ids=["together", "one after the other"])
def test_no_rank_holds_a_row_that_another_one_could_start(num_rows: int, start_s: dict[int, float]) -> None:
    result = run(np.full(num_rows, 1000), start_s=start_s)
    one_row_s = 1000 * (MODEL.step_s + MODEL.seq_s)
    assert result.wall_s <= one_row_s + max(start_s.values(), default=0.0) + 0.01
    assert (result.busy_s > 0).sum() == num_rows
