"""Set engine options that the user has left out, where vLLM's own defaults do not work."""

from __future__ import annotations

import math
from typing import Any

import psutil
from vllm.engine.arg_utils import EngineArgs

from dpgen.engine.messages import EngineSpec
from dpgen.engine.pool.device_monitor import DeviceMonitor
from dpgen.engine.pool.engine_count import fit_memory
from dpgen.errors import ConfigError


def share_memory(
    options: dict[str, Any], spec: EngineSpec, device: DeviceMonitor, *, on_cpu: bool
) -> tuple[int, list[str]]:
    """Give each of several engines its part of the memory.

    Ranks that share a GPU divide what the user has not given; the engines of a rank divide what is the rank's.

    Returns:
        the number of engines of this rank, which is lower than the spec's where the memory has no room and the spec
        allows it, and a note for each change.

    Raises:
        ConfigError: so many copies of the weights don't fit.
    """
    given = options.get("gpu_memory_utilization")
    fraction = EngineArgs.gpu_memory_utilization / spec.num_sharing if given is None else given
    num_engines = _count_engines(spec, int(fraction * device.memory_bytes), device.free_bytes)
    if num_engines > 1 and options.get("kv_cache_memory_bytes"):
        options["kv_cache_memory_bytes"] //= num_engines
    if on_cpu or (num_engines == 1 and (given is not None or spec.num_sharing == 1)):
        return num_engines, []
    options["gpu_memory_utilization"] = math.floor(1000 * fraction / num_engines) / 1000
    if num_engines > 1:
        return num_engines, []
    note = f"{spec.num_sharing} engines on a GPU, each with gpu_memory_utilization={options['gpu_memory_utilization']}"
    return 1, [f"parallel.share_devices: {note}"]


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
    if "kv_cache_memory_bytes" not in options and "gpu_memory_utilization" not in options:
        num_bytes = min(4 << 30, psutil.virtual_memory().available // (4 * num_engines))
        options["kv_cache_memory_bytes"] = num_bytes
        notes.append(
            f"vLLM on the CPU: KV cache of {num_bytes >> 20:,} MiB, because vLLM's default exceeds free memory"
        )
    return notes
