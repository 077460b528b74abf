"""Memory that other processes hold: vLLM's own check of it, and a run that goes on with what is free."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.jobs import Launcher, make_numbered_rows

from dpgen.engine.messages import EngineSpec
from dpgen.engine.starting.limits import EngineMemory
from dpgen.errors import ConfigError, EngineError, FreeMemory

GIB = 1 << 30


@pytest.mark.vllm
def test_vllm_accepts_the_memory_that_its_own_error_leads_to() -> None:
    from vllm.v1.worker.utils import request_memory

    for free_gib in (0.99, 1.1, 11.2, 68.77, 125.8):
        snapshot: Any = SimpleNamespace(
            free_memory=int(free_gib * GIB), total_memory=int(139.8 * GIB), device_="cuda:3"
        )
        cache_config: Any = SimpleNamespace(gpu_memory_utilization=0.92)
        with pytest.raises(ValueError, match="desired GPU memory utilization") as raised:
            request_memory(snapshot, cache_config)
        free = EngineError(f"the engine failed: ValueError: {raised.value}").free_memory
        assert free == FreeMemory("cuda:3", free_gib, 139.8, is_at_start=True)
        cache_config.gpu_memory_utilization = free.fraction
        assert request_memory(snapshot, cache_config) <= snapshot.free_memory - snapshot.total_memory / 200
        is_enough = free_gib > 4
        assert bool(free.advice) == is_enough, "a fraction of 0 helps nobody"


def test_the_cpu_s_errors_name_the_key_of_the_memory_that_is_too_much() -> None:
    start = EngineError(
        "ValueError: Available memory on node 0 (5.0/20.0 GiB) on startup is less than desired CPU memory utilization "
        "(0.92, 18.4 GiB)."
    )
    assert start.summarize().endswith(
        "only 5.0 of 20.0 GiB are free on node 0, set engine.gpu_memory_utilization=0.24 or lower"
    )
    cache = EngineError(
        "ValueError: Available memory on node 0 (5.0/20.0 GiB) on kv cache allocation is less than requested memory "
        "for kv (8.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by "
        "other processes."
    )
    assert cache.summarize().endswith(", set engine.kv_cache_memory_bytes to less than 5368709120")
    assert start.is_out_of_memory and cache.is_out_of_memory


@pytest.mark.vllm
def test_engines_on_one_gpu_divide_its_memory_unless_the_user_has() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from dpgen.engine.vllm.default_options import share_memory

    def share(options: dict[str, Any], **shared: Any) -> list[str]:
        return share_memory(options, EngineSpec("vllm", "m", **shared), FakeDevice(), on_cpu=False)[1]  # type: ignore[arg-type]

    options: dict[str, Any] = {}
    [note] = share(options, num_sharing=3)
    assert (
        0.99 * EngineArgs.gpu_memory_utilization
        < 3 * options["gpu_memory_utilization"]
        <= EngineArgs.gpu_memory_utilization
    )
    assert note.startswith("parallel.share_devices: 3 engines on a GPU, each with gpu_memory_utilization=0.3")
    assert share(options, num_sharing=3) == [] and share({}) == []
    assert EngineSpec("vllm", "m").num_sharing == 1


class FakeDevice:
    memory_bytes, free_bytes = 80 << 30, 79 << 30


@pytest.mark.vllm
def test_the_engines_of_a_rank_divide_what_is_the_ranks() -> None:
    from dpgen.engine.vllm.default_options import share_memory

    def share(options: dict[str, Any], on_cpu: bool = False, **shared: Any) -> int:
        spec = EngineSpec("vllm", "m", **shared)
        return share_memory(options, spec, FakeDevice(), on_cpu=on_cpu)[0].num_engines  # type: ignore[arg-type]

    given: dict[str, Any] = {"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": 9 << 30}
    assert share(given, num_engines=3) == 3
    assert given == {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 3 << 30}
    shared: dict[str, Any] = {}
    assert share(shared, num_engines=2, num_sharing=2) == 2 and shared == {"gpu_memory_utilization": 0.23}
    on_cpu: dict[str, Any] = {}
    assert share(on_cpu, on_cpu=True, num_engines=2) == 2 and on_cpu == {}, "the CPU's default divides its own memory"
    auto: dict[str, Any] = {}
    needs: dict[str, Any] = {"num_engines": 4, "is_num_engines_auto": True, "engine_bytes": 30 << 30}
    assert share(auto, **needs) == 2, "as many as the memory has room for"
    with pytest.raises(ConfigError, match=r"engines_per_rank=3: weights of 30.0 GiB .* at most 2 do"):
        share({}, num_engines=3, weight_bytes=30 << 30)


@pytest.mark.vllm
def test_the_engines_that_auto_starts_divide_what_other_processes_leave() -> None:
    from dpgen.engine.vllm.default_options import share_memory

    device: Any = SimpleNamespace(memory_bytes=80 << 30, free_bytes=40 << 30)
    auto = EngineSpec("vllm", "m", num_engines=3, is_num_engines_auto=True, engine_bytes=8 << 30)
    options: dict[str, Any] = {}
    spec, [note] = share_memory(options, auto, device, on_cpu=False)
    # less than half, since each has a context beside its part
    assert (spec.num_engines, spec.memory_fraction, options) == (3, 0.46, {"gpu_memory_utilization": 0.153})
    assert note == "40.0 of 80.0 GiB of the GPU are free, for all its engines"
    device.free_bytes, later = 27 << 30, dict[str, Any]()  # the first engine has loaded
    joining = dataclasses.replace(spec, is_num_engines_auto=False)
    assert share_memory(later, joining, device, on_cpu=False) == (joining, [])
    assert later == options, "each has the same part"
    given: dict[str, Any] = {"gpu_memory_utilization": 0.9}
    assert share_memory(given, auto, device, on_cpu=False)[1] == [] and given == {"gpu_memory_utilization": 0.3}


def test_where_several_engines_divide_the_memory_the_advice_is_for_all_of_them() -> None:
    memory = EngineMemory(EngineSpec("vllm", "m", options={"gpu_memory_utilization": 0.9}, num_engines=3))
    error = EngineError(
        "ValueError: Free memory on device cuda:0 (20.0/80.0 GiB) on startup is less than desired GPU memory "
        "utilization (0.3, 24.0 GiB)."
    )
    for _ in range(2):
        assert memory.reduce_after(error, 1) == "", "the user has set it"
    assert error.summarize().endswith(
        "GiB are free on cuda:0, set engine.gpu_memory_utilization=0.72 or lower, which 3 engines divide"
    )


def test_memory_that_runs_out_again_lowers_what_is_known_and_no_cache_is_lowered_to_nothing() -> None:
    out_of_memory = EngineError("the engine failed: torch.OutOfMemoryError: CUDA out of memory.")
    memory = EngineMemory(EngineSpec("vllm", "m", options={"kv_cache_memory_bytes": None}))
    assert memory.reduce_after(out_of_memory, 3) == " with gpu_memory_utilization=0.82"
    several = EngineMemory(EngineSpec("vllm", "m", options={"gpu_memory_utilization": None}, num_engines=2))
    assert several.reduce_after(out_of_memory, 3) == " with gpu_memory_utilization=0.41"
    no_room = EngineError("the engine failed: ValueError: No available memory for the cache blocks.")
    assert not memory.blames_given_cache(no_room), "null gives none"
    memory.kv_bytes = 0
    assert memory.reduce_after(no_room, 3) == "", "a smaller cache is no help"


@pytest.mark.multi
@pytest.mark.parametrize("has_own_limit", [False, True])
def test_a_run_goes_on_with_the_memory_that_is_free_or_says_what_to_write(
    launcher: Launcher, write_config: Callable[..., str], has_own_limit: bool
) -> None:
    options = {"free_gib": 49.19} | ({"gpu_memory_utilization": 0.9} if has_own_limit else {})
    job = launcher.dpgen("run", write_config(make_numbered_rows(20), engine=options))
    status = job.wait()
    held = "the engine did not start: only 49.2 of 100.0 GiB are free on cuda:0"
    if has_own_limit:
        assert status == 75 and f"{held}, set engine.gpu_memory_utilization=0.48 or lower, see " in job.output, (
            job.output
        )
        assert job.output.count("set engine.gpu_memory_utilization") == 1, "one error"
    else:
        assert status == 0, job.output
        assert job.output.count(f"{held}, retrying its start-up with gpu_memory_utilization=0.48") == 1, job.output
