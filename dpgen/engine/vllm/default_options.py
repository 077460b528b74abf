"""Set engine options that the user has left out, where vLLM's own defaults do not work."""

from __future__ import annotations

import math
from typing import Any

import psutil
from vllm.engine.arg_utils import EngineArgs


def share_memory(options: dict[str, Any], num_sharing: int) -> list[str]:
    """Give each of several engines on a GPU its part of the memory, unless the user has, and return a note for it."""
    if num_sharing == 1 or "gpu_memory_utilization" in options:
        return []
    fraction = math.floor(1000 * EngineArgs.gpu_memory_utilization / num_sharing) / 1000
    options["gpu_memory_utilization"] = fraction
    return [f"parallel.share_devices: {num_sharing} engines on a GPU, each with gpu_memory_utilization={fraction:g}"]


def apply_cpu_defaults(options: dict[str, Any], local_size: int, *, samples: bool = True) -> list[str]:
    """Set options that work on the CPU, unless the user has set them, and return a note for each.

    Args:
        samples: True if tokens are sampled.
    """
    notes = []
    if samples and "enable_chunked_prefill" not in options:
        options["enable_chunked_prefill"] = False
        notes.append("vLLM on the CPU: no chunked prefill, because it crashes seeded sampling")
    if "kv_cache_memory_bytes" not in options and "gpu_memory_utilization" not in options:
        num_bytes = min(4 << 30, psutil.virtual_memory().available // (4 * local_size))
        options["kv_cache_memory_bytes"] = num_bytes
        notes.append(
            f"vLLM on the CPU: KV cache of {num_bytes >> 20:,} MiB, because vLLM's default exceeds free memory"
        )
    return notes
