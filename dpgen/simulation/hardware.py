"""Estimate an engine's constants from the model's size and the GPU's name: rough, for want of a measurement.

A step reads the weights once and each sequence's KV cache, and computes one token a sequence; so the constants of the
measured engine (`dpgen.simulation.reference`) scale with memory bandwidth and with arithmetic. Figures of GPUs are of
their makers (dense bf16, without sparsity).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpgen.data.model_facts import ModelSize
from dpgen.simulation import reference
from dpgen.simulation.simulator import EngineCostModel

_MIN_STEP_S = 1.5e-3  # launching kernels and scheduling take this long, however small the model
_RESERVED_BYTES = 2 << 30  # activations, CUDA graphs
_LARGE_BYTES = 70 << 30  # vLLM runs more sequences at a time from here on


@dataclass(frozen=True)
class Gpu:
    """Hold a GPU's memory bandwidth in bytes/s, arithmetic in flop/s (bf16), and memory in bytes."""

    name: str
    bandwidth: float
    flops: float
    memory: float


def _gpu(name: str, terabytes_s: float, teraflops: float, gigabytes: float) -> Gpu:
    return Gpu(name, terabytes_s * 1e12, teraflops * 1e12, gigabytes * 1e9)


REFERENCE_GPU = _gpu("H100", 3.35, 989, 80)
# The first whose name is within the GPU's counts, so that longer names come first.
GPUS = (
    *(_gpu("GB200", 8.0, 2250, 192), _gpu("B200", 8.0, 2250, 192), _gpu("GH200", 4.0, 989, 96)),
    *(_gpu("H200", 4.8, 989, 141), _gpu("H100 PCIe", 2.0, 756, 80), REFERENCE_GPU, _gpu("H800", 3.35, 989, 80)),
    *(_gpu("H20", 4.0, 148, 96), _gpu("A100 40GB", 1.55, 312, 40), _gpu("A100", 2.0, 312, 80)),
    *(_gpu("A800", 2.0, 312, 80), _gpu("L40S", 0.864, 362, 48), _gpu("L40", 0.864, 181, 48), _gpu("L4", 0.3, 121, 24)),
    *(_gpu("A10G", 0.6, 70, 24), _gpu("A10", 0.6, 125, 24), _gpu("A40", 0.696, 150, 48), _gpu("A6000", 0.768, 155, 48)),
    *(_gpu("V100", 0.9, 112, 32), _gpu("T4", 0.32, 65, 16), _gpu("RTX 5090", 1.79, 210, 32)),
    *(_gpu("RTX 4090", 1.0, 165, 24), _gpu("RTX 3090", 0.936, 71, 24)),
    *(_gpu("MI325X", 6.0, 1307, 256), _gpu("MI300X", 5.3, 1307, 192), _gpu("MI250X", 3.2, 383, 128)),
)


def find_gpu(name: str) -> Gpu | None:
    """Return what is known of a GPU by a name like ``NVIDIA A100-SXM4-40GB``; None for an unknown one."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    return next((gpu for gpu in GPUS if set(gpu.name.upper().split()) <= words), None)


def read_gpu_name(folder: Path = Path("/proc/driver/nvidia/gpus")) -> str | None:
    """Return the model name of this machine's first NVIDIA GPU, without loading CUDA; None if there is none.

    Args:
        folder: where NVIDIA's driver describes the GPUs.
    """
    for path in sorted(folder.glob("*/information")):
        try:
            found = re.search(r"^Model:\s*(.+?)\s*$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        except OSError:
            continue
        if found:
            return found[1]
    return None


def estimate_cost_model(size: ModelSize, gpu: Gpu, num_gpus: int, options: Mapping[str, Any]) -> EngineCostModel:
    """Return an engine's constants by the model's size and the GPU.

    Args:
        num_gpus: that share one model copy; the loss of splitting it is not counted.
        options: fields of vLLM's EngineArgs, of which those that limit sequences and the KV cache count.
    """
    by_bandwidth = REFERENCE_GPU.bandwidth / (gpu.bandwidth * num_gpus)
    by_flops = REFERENCE_GPU.flops / (gpu.flops * num_gpus) * size.num_active_params / reference.NUM_ACTIVE_PARAMS
    return EngineCostModel(
        step_s=max(_MIN_STEP_S, reference.STEP_MS / 1e3 * by_bandwidth * size.weight_bytes / reference.WEIGHT_BYTES),
        seq_s=reference.SEQ_US / 1e6 * by_flops,
        kv_s=reference.KV_NS / 1e9 * by_bandwidth * size.kv_bytes / reference.KV_BYTES,
        prefill_s=reference.PREFILL_US / 1e6 * by_flops,
        max_num_seqs=_find_max_num_seqs(gpu, options),
        kv_tokens=_count_kv_tokens(size, gpu, num_gpus, options),
    )


def find_batched_tokens(gpu_name: str | None, memory_bytes: int) -> int:
    """Return vLLM's default of `max_num_batched_tokens` (0.26 to 0.33, `EngineArgs.get_batch_defaults`).

    Args:
        memory_bytes: of the GPU.
    """
    return 16384 if _has_large_batches(gpu_name or "", memory_bytes) else 8192


def compute_free_bytes(size: ModelSize, gpu: Gpu, num_gpus: int, options: Mapping[str, Any]) -> float:
    """Return the bytes that one model copy leaves for its KV cache; negative if the weights don't fit."""
    fraction = options.get("gpu_memory_utilization")
    usable = gpu.memory * (fraction if isinstance(fraction, int | float) else 0.9) - _RESERVED_BYTES
    return usable * num_gpus - size.weight_bytes


def _find_max_num_seqs(gpu: Gpu, options: Mapping[str, Any]) -> int:
    given = options.get("max_num_seqs")
    if isinstance(given, int) and given > 0:
        return given
    has_large = _has_large_batches(gpu.name, gpu.memory)
    return 1024 if has_large else reference.MAX_NUM_SEQS  # vLLM 0.32, `EngineArgs.get_batch_defaults`


def _has_large_batches(gpu_name: str, memory_bytes: float) -> bool:
    return memory_bytes >= _LARGE_BYTES and "A100" not in gpu_name


def _count_kv_tokens(size: ModelSize, gpu: Gpu, num_gpus: int, options: Mapping[str, Any]) -> int | None:
    given = options.get("kv_cache_memory_bytes")
    free = given * num_gpus if isinstance(given, int) else compute_free_bytes(size, gpu, num_gpus, options)
    return max(1, int(free / size.kv_bytes)) if free > 0 else None
