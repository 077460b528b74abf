"""Set engine options that the user has left out, where vLLM's own defaults do not work."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import psutil
import vllm
from vllm.engine.arg_utils import EngineArgs

from dpgen.engine.messages import EngineSpec
from dpgen.engine.pool.device_monitor import DeviceMonitor
from dpgen.engine.pool.engine_count import fit_memory
from dpgen.engine.vllm.versions import keeps_seeds_on_cpu
from dpgen.errors import ConfigError, FreeMemory

_CONTEXT_GIB = 0.6  # that each process holds on a GPU beside what vLLM counts: CUDA's context and its modules


def share_memory(
    options: dict[str, Any], spec: EngineSpec, device: DeviceMonitor, *, on_cpu: bool
) -> tuple[EngineSpec, list[str]]:
    """Give each of several engines its part of the memory.

    Ranks that share a GPU divide what the user has not given; the engines of a rank divide what is the rank's. Where
    their number is found here, that is no more than what other processes leave, unless the user has given it.

    Returns:
        the spec with the number of engines of this rank, which is lower where the memory has no room and the spec
        allows it, and a note for each change.

    Raises:
        ConfigError: so many copies of the weights don't fit.
    """
    given, notes = options.get("gpu_memory_utilization"), list[str]()
    usual = spec.memory_fraction or EngineArgs.gpu_memory_utilization / spec.num_sharing
    fraction = usual if given is None else given
    num_engines = _count_engines(spec, int(fraction * device.memory_bytes), device.free_bytes)
    if given is None and spec.is_num_engines_auto and device.free_bytes and num_engines > 1:
        free_gib, total_gib = device.free_bytes / 2**30, device.memory_bytes / 2**30
        fraction = FreeMemory("", free_gib - num_engines * _CONTEXT_GIB, total_gib, is_at_start=True).fraction
        fraction = min(usual, fraction or usual)
        num_engines = _count_engines(spec, int(fraction * device.memory_bytes), device.free_bytes)
        if fraction < usual:
            notes.append(f"{free_gib:.1f} of {total_gib:.1f} GiB of the GPU are free, for all its engines")
    spec = dataclasses.replace(spec, num_engines=num_engines)
    if num_engines > 1 and options.get("kv_cache_memory_bytes"):
        options["kv_cache_memory_bytes"] //= num_engines
    if on_cpu or (num_engines == 1 and (given is not None or spec.num_sharing == 1)):
        return spec, []
    options["gpu_memory_utilization"] = math.floor(1000 * fraction / num_engines) / 1000
    if num_engines > 1:
        return (spec if given is not None else dataclasses.replace(spec, memory_fraction=fraction)), notes
    note = f"{spec.num_sharing} engines on a GPU, each with gpu_memory_utilization={options['gpu_memory_utilization']}"
    return spec, [f"parallel.share_devices: {note}"]


def _count_engines(spec: EngineSpec, rank_bytes: int, free_bytes: int) -> int:
    """Return how many engines the rank's part of a GPU's memory has room for, at most the spec's number.

    Args:
        rank_bytes: the rank's part; 0 where unknown.
        free_bytes: of the GPU, now.
    """
    if spec.num_engines == 1:
        return 1
    if spec.is_num_engines_auto:
        if not rank_bytes:
            return 1
        return fit_memory(spec.num_engines, spec.engine_bytes, min(rank_bytes, free_bytes or rank_bytes))
    if 0 < rank_bytes <= spec.weight_bytes * spec.num_engines:
        raise ConfigError(
            f"parallel.engines_per_rank={spec.num_engines}: weights of {spec.weight_bytes / 2**30:.1f} GiB for each "
            f"engine don't fit in {rank_bytes / 2**30:.1f} GiB, at most {max(1, rank_bytes // spec.weight_bytes)} do"
        )
    return spec.num_engines


def apply_cpu_defaults(options: dict[str, Any], num_engines: int, *, samples: bool = True) -> list[str]:
    """Set options that work on the CPU, unless the user has set them, and return a note for each.

    Args:
        num_engines: engines on this machine, of all ranks, which share its memory.
        samples: True if tokens are sampled.
    """
    notes = []
    if samples and "enable_chunked_prefill" not in options:
        options["enable_chunked_prefill"] = False
        notes.append("vLLM on the CPU: no chunked prefill, because it crashes seeded sampling")
    if samples and not keeps_seeds_on_cpu(vllm.__version__):
        notes.append("vLLM on the CPU: seeds have no effect beside greedy rows, because vLLM before 0.29 drops them")
    if "kv_cache_memory_bytes" not in options and "gpu_memory_utilization" not in options:
        num_bytes = min(4 << 30, psutil.virtual_memory().available // (4 * num_engines))
        options["kv_cache_memory_bytes"] = num_bytes
        notes.append(
            f"vLLM on the CPU: KV cache of {num_bytes >> 20:,} MiB, because vLLM's default exceeds free memory"
        )
    return notes
