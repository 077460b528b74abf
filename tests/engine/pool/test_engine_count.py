"""How many engines a rank runs: by its configuration, by the model's size, and by what the first one measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from dpgen.config.loader import load
from dpgen.config.schema import Config
from dpgen.engine.messages import EngineStats
from dpgen.engine.pool.engine_count import (
    Calibration,
    Signals,
    decide_engine_count,
    estimate_engine_bytes,
    fit_memory,
    pays,
    plan_engine_count,
)
from dpgen.errors import ConfigError

GIB = 1 << 30


def make_config(*words: str) -> Config:
    return load([], ["run.dir=r", "model=m", "data.path=d.jsonl", "data.prompt_column=p", *words])


def plan(size_bytes: float, *words: str, num_cores: int = 16, on_gpu: bool = True) -> tuple[int, bool]:
    count = plan_engine_count(make_config(*words), size_bytes, num_cores, on_gpu=on_gpu)
    return count.number, count.is_auto


@pytest.mark.parametrize(
    ("billions", "number"), [(0.5, 4), (1.3, 4), (2, 3), (4, 2), (8, 1), (70, 1)], ids="{0}".format
)
def test_small_models_may_have_several_engines_and_a_large_one_gets_all_memory_at_once(
    billions: float, number: int
) -> None:
    assert plan(2e9 * billions) == (number, number > 1), "weights in 16 bits"


def test_what_a_user_sets_is_taken_and_what_rules_it_out_is_named() -> None:
    assert plan(2e9, "parallel.engines_per_rank=3") == (3, False)
    assert plan(2e9, "parallel.engines_per_rank=1") == (1, False)
    for words in (
        ["parallel.tensor_parallel_size=2"],
        ["parallel.pipeline_parallel_size=2"],
        ["parallel.launcher=external"],
    ):
        assert plan(2e9, *words) == (1, False)
        with pytest.raises(ConfigError, match="engines_per_rank=2: must be auto or 1 with parallel"):
            make_config("parallel.engines_per_rank=2", *words)
    for value in ("0", "-1", "true", "1.5", "x", "null"):
        with pytest.raises(ConfigError, match=r"engines_per_rank=.*: must be auto, or a whole number of at least 1"):
            make_config(f"parallel.engines_per_rank={value}")


def test_auto_is_one_engine_on_the_cpu_with_few_cores_and_where_nothing_is_known() -> None:
    assert plan(2e9, on_gpu=False) == (1, False)
    assert plan(2e9, num_cores=2) == (1, False)
    assert plan(2e9, num_cores=4) == (3, True)
    assert plan(0) == (1, False)
    assert plan(2e9, "engine.kv_cache_memory_bytes=1000000000") == (1, False)
    assert plan(2e9, "run.engine=fake") == (1, False)
    shared = plan_engine_count(make_config(), 2e9, 16, on_gpu=True, num_sharing=3)
    assert shared.describe() == "1 engine a rank: 3 ranks share its GPU", "the user has divided it by hand"


def test_the_memory_limits_the_number() -> None:
    needs = estimate_engine_bytes(2.5 * GIB, 32 << 10, {"max_num_seqs": 256})
    assert needs == (2.5 + 2 + 4) * GIB
    assert estimate_engine_bytes(2.5 * GIB, 32 << 10, {"max_num_seqs": 256, "max_model_len": 128}) == 5.5 * GIB
    assert [fit_memory(4, needs, memory * GIB) for memory in (80, 24, 16)] == [4, 2, 1]
    assert fit_memory(4, 0, 80 * GIB) == 4, "nothing is known of the model"


@pytest.mark.parametrize(
    ("step_ms", "processor_ms", "busy", "number"),
    [
        (8.5, 8.4, 0.33, 3),  # 1 billion on an H100
        (8.5, 8.4, 0.41, 3),
        (8.5, 8.4, 0.15, 4),
        (8.5, 8.4, 0.60, 2),
        (13.5, 6.9, 0.96, 1),  # 8 billion
        (27.6, 22.0, 0.96, 1),  # 8 billion, 512 sequences: the processor waits by spinning
        (8.5, 2.0, 0.3, 1),  # something else is the limit
        (8.5, 8.45, None, 2),
        (27.6, 25.0, None, 1),  # it may spin
    ],
)
def test_engines_are_added_until_the_device_is_busy(
    step_ms: float, processor_ms: float, busy: float | None, number: int
) -> None:
    count = decide_engine_count(Signals(step_ms / 1000, processor_ms / 1000, busy, 256), 4)
    assert count.number == number and f"takes {step_ms:.1f} ms" in count.why
    assert count.facts["device_busy"] == busy and not count.is_auto


def test_a_full_kv_cache_is_a_reason_for_the_rest_of_the_memory() -> None:
    count = decide_engine_count(Signals(0.0135, 0.007, 0.96, 90, is_kv_full=True), 2)
    assert count.number == 2 and "KV cache is full" in count.why


def make_stats(elapsed_s: float, num_running: int = 256, step_s: float = 0.01, **changes: Any) -> EngineStats:
    num_steps = round(elapsed_s / step_s)
    stats = EngineStats(0, num_running, 32, num_steps=num_steps, elapsed_s=elapsed_s, processor_s=0.9 * elapsed_s)
    return dataclasses.replace(stats, **{"device_busy": 0.4, **changes})


def measure(reports: Iterable[EngineStats]) -> tuple[float, Signals]:
    """Return when the measurement is done, and what it found."""
    calibration = Calibration(256, max_engines=4)
    for stats in reports:
        found = calibration.add(stats, stats.elapsed_s)
        if found is not None:
            assert isinstance(found, Signals)
            return stats.elapsed_s, found
    pytest.fail("the measurement is not done")


def sample(step_s: float = 0.01, **changes: Any) -> Iterator[EngineStats]:
    """Yield the reports of an engine that is full from second 1.25 on, whose first second looks like a busy device."""
    for quarter in range(1, 40):
        elapsed_s = quarter / 4
        if elapsed_s < 1.25:
            yield make_stats(elapsed_s, num_running=20, step_s=step_s)
        else:
            early = {"device_busy": 1.0, "processor_s": 0.0} if elapsed_s < 1.75 else {}
            yield make_stats(elapsed_s, step_s=step_s, **{**changes, **early})


def test_a_full_engine_is_measured_for_a_second_without_what_comes_first() -> None:
    done_s, signals = measure(sample())
    assert done_s == 1.25 + 0.5 + 1.0 and signals.num_running == 256
    assert (signals.step_s, signals.processor_s, signals.device_busy) == pytest.approx((0.01, 0.009, 0.4))


def test_long_steps_are_measured_for_longer_and_very_long_ones_not_for_ever() -> None:
    assert measure(sample(step_s=0.04))[0] == 1.25 + 0.5 + 1.25
    assert measure(sample(step_s=0.5))[0] == 1.25 + 1.0 + 3.0


def test_a_measurement_whose_halves_disagree_continues_and_all_of_it_counts() -> None:
    reports = [dataclasses.replace(stats, device_busy=0.25 if stats.elapsed_s < 2.5 else 0.45) for stats in sample()]
    done_s, signals = measure(reports)
    assert done_s == 1.25 + 0.5 + 3.0
    assert signals.device_busy == pytest.approx((0.25 + 10 * 0.45) / 11), "where 0.25 says 4 engines, and 0.45 says 2"


def test_an_engine_whose_rows_end_together_now_and_then_counts_as_full() -> None:
    reports = [make_stats(quarter / 4, 150 if quarter % 3 == 0 else 256) for quarter in range(1, 40)]
    done_s, signals = measure(reports)
    assert done_s < 3 and signals.step_s == pytest.approx(0.01)


def test_a_restarted_engine_is_measured_from_its_start() -> None:
    before = [stats for stats in sample() if stats.elapsed_s < 2.5]
    done_s, signals = measure([*before, *sample(step_s=0.02)])
    assert done_s == 1.25 + 0.5 + 1.0 and signals.step_s == pytest.approx(0.02)


def test_an_engine_that_the_rows_do_not_fill_is_enough() -> None:
    calibration = Calibration(256, max_engines=4)
    assert calibration.add(make_stats(5, num_running=20, num_waiting=0), 5.0) is None
    few = make_stats(26, num_running=20, num_waiting=0)
    assert calibration.add(few, 26.0) == "the rows fill 20 of the 256 sequences of one engine"


def test_an_engine_that_waits_for_its_first_rows_is_measured_once_it_has_them() -> None:
    late = [dataclasses.replace(stats, elapsed_s=stats.elapsed_s + 60) for stats in sample()]
    done_s, signals = measure(late)
    assert done_s == 60 + 1.25 + 0.5 + 1.0 and signals.num_running == 256, "it was ready a minute before other ranks"


@pytest.mark.parametrize("num_waiting", [32, 0], ids=["long prompts", "media that take time"])
def test_an_engine_that_fills_slowly_is_measured_once_it_is_full(num_waiting: int) -> None:
    filling = [make_stats(s, num_running=min(256, 2 * s), num_waiting=num_waiting, step_s=0.5) for s in range(1, 120)]
    done_s, signals = measure([*filling, *(make_stats(120 + quarter / 4) for quarter in range(40))])
    assert done_s > 116 and signals.num_running == 256


def test_an_engine_that_long_prompts_never_let_be_full_is_measured_as_it_is() -> None:
    busy = [make_stats(second, num_running=40 + second % 5, step_s=0.3, device_busy=1.0) for second in range(1, 60)]
    done_s, signals = measure(busy)
    assert 20 < done_s < 30
    assert decide_engine_count(signals, 4).number == 1


def test_an_engine_that_dies_before_it_is_measured_is_measured_in_its_next_life() -> None:
    calibration = Calibration(256, max_engines=4)
    found = [calibration.add(make_stats(s / 4, num_running=20 + s), s / 4) for s in range(1, 8)]
    found += [calibration.add(stats, 60 + stats.elapsed_s) for stats in sample()]
    first = next(signals for signals in found if signals is not None)
    assert isinstance(first, Signals) and first.num_running == 256


def test_another_engine_pays_only_if_enough_is_left() -> None:
    assert pays(10_000, 100, start_s=20, rows_at_once=256)
    assert not pays(2_000, 100, start_s=20, rows_at_once=256), "done in 20 s"
    assert not pays(300, 1, start_s=20, rows_at_once=256), "too few to fill two engines"
    assert pays(10_000, 0, start_s=20, rows_at_once=256) and not pays(500, 0, start_s=20, rows_at_once=256)
