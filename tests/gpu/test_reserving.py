"""GPUs are shared among tests that run at the same time."""

from __future__ import annotations

import threading
from pathlib import Path

from helpers.gpus import NUM_SLOTS, find_noise, reserve_gpus
from helpers.jobs import wait_for

GPUS = ["0", "1", "2"]


def test_tests_spread_over_the_gpus_and_one_that_measures_memory_has_its_gpu_alone(tmp_path: Path) -> None:
    with reserve_gpus(GPUS, 1, folder=tmp_path) as first, reserve_gpus(GPUS, 1, folder=tmp_path) as second:
        with reserve_gpus(GPUS, 1, whole=True, folder=tmp_path) as alone:
            assert (first, second, alone) == (["0"], ["1"], ["2"])
            with reserve_gpus(GPUS, 2, folder=tmp_path) as both:
                assert both == ["0", "1"]
    with reserve_gpus(GPUS, 3, whole=True, folder=tmp_path) as again:
        assert again == GPUS, "all slots are free again"


def test_a_test_waits_until_enough_slots_are_free(tmp_path: Path) -> None:
    taken: list[list[str]] = []

    def take_all() -> None:
        with reserve_gpus(GPUS, 3, whole=True, folder=tmp_path) as gpus:
            taken.append(gpus)

    waiting = threading.Thread(target=take_all, daemon=True)
    with reserve_gpus(GPUS, 1, folder=tmp_path):
        waiting.start()
        wait_for((tmp_path / f"2-{NUM_SLOTS - 1}").exists)
        assert not taken
    waiting.join(60)
    assert taken == [GPUS]


def test_noise_is_every_line_that_is_not_dpgens_own() -> None:
    own = "2026-11-27 09:45:14 INFO [rank 0] 200 rows over 1 rank"
    bar = "Capturing CUDA graphs:  40%|####      | 2/5 [00:01<00:01,  1.9it/s]"
    warning = "2026-11-27 09:45:14 WARNING [rank 1 engine] WARNING 11-27 09:45:14 [x.py:1] something"
    assert find_noise("\n".join([own, bar, warning, "", "    its last line", own])) == [bar, warning]
