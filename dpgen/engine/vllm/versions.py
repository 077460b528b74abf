"""Know what changed from vLLM 0.26 to 0.33, of what dpgen or a configuration uses.

- `REMOVED` and `ADDED_IN` hold fields of EngineArgs and SamplingParams. They count only where the installed vLLM
  doesn't know the name: `describe_version` says what to write instead, or which version to install. Names that went
  before 0.26 are in `dpgen.config.vllm.vllm_fields`.
- `CHANGED` holds what dpgen works around, with the place that does.
- tests/golden/vllm_signatures.json has the facts, read in each version's wheel: tests compare all that dpgen imports,
  calls and reads of vLLM, which they find in dpgen's source themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

OLDEST, NEWEST = "0.26", "0.33"  # that were read
HOOKED = ("0.26", "0.32")  # whose work for each token was read, line by line


@dataclass(frozen=True)
class Removal:
    """Describe a field that went.

    Attributes:
        version: the first one without it.
        instead: what to do, as the end of a sentence.
    """

    version: str
    instead: str


_PREFILLS = Removal("0.27", "vLLM now prefills as many prompts at a time as engine.max_num_batched_tokens lets it")

REMOVED: Mapping[str, Mapping[str, Removal]] = {
    "engine": {
        "max_num_partial_prefills": _PREFILLS,
        "max_long_partial_prefills": _PREFILLS,
        "calculate_kv_scales": Removal("0.28", "leave it out: the scales come from the checkpoint, and else are 1.0"),
        "override_attention_dtype": Removal("0.28", "leave it out: it only ever had an effect on ROCm"),
        "enable_bf16x3_router_gemm": Removal("0.30", "leave it out: vLLM chooses the kernel itself"),
        "enable_mamba_fine_grained_prefix_cache": Removal(
            "0.31", "write engine.enable_mamba_shared_prefix_checkpoint, its new name"
        ),
    },
    "sampling": {},
}

ADDED_IN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "engine": {
        "0.27": (
            *("enable_fault_tolerance", "fault_tolerance_config", "kda_prefill_backend", "mamba_ssu_algorithm"),
            *("mm_hasher_algorithm", "replayssm_buffer_len", "use_replayssm", "video_pruning_method"),
        ),
        "0.28": ("ec_manager_config", "mm_device_do_normalize", "mm_processor_device", "return_sampling_mask"),
        "0.29": (
            *("dcp_q_replicate", "enable_batch_sharded_sampling", "enable_trace_replay", "max_num_queued_reqs"),
            *("max_num_queued_tokens", "per_request_spec_decode_metrics", "prefix_cache_retention_interval"),
        ),
        "0.30": (
            *("dp_sync_interval", "elastic_ep_max_dp_size", "enable_nccl_comm_suspend", "engram_config"),
            *("kda_decode_backend", "sparse_indexer_topk_backend", "watermark_config"),
        ),
        "0.31": (
            *("aux_output_config", "enable_mamba_shared_prefix_checkpoint", "log_config_file", "log_level"),
            *("logging_config", "long_prefill_token_threshold_adaptive", "max_lora_cls_labels", "max_num_active_seqs"),
            *("sleep_preserve_parameter_names", "swa_bounded_replay"),
        ),
        "0.32": ("custom_histogram_buckets", "enable_hc_sp", "enable_shm_tensor_arena", "sleep_mode_offload_cudagraph"),
        "0.33": ("monokernel", "sleep_mode_backend", "watchdog_config"),
    },
    "sampling": {
        "0.27": ("stream_interval",),
        "0.29": ("trace_decode_token_ids",),
        "0.30": ("watermarking",),
        "0.31": ("prompt_logprob_start", "prompt_logprob_token_ids"),
    },
}

# The version, what is different in it, and where dpgen takes care of it.
CHANGED = (
    (
        "0.27",
        "a chat request's _grammar_from_tool_parser has the name _grammar_from_parser",
        "reasoning.py: asks for both",
    ),
    (
        "0.29",
        "the V2 model runner is the default where it supports the model, before for a list (VLLM_USE_V2_MODEL_RUNNER)",
        "config/environment.py: the variable is in a run's identity; vllm_backend.py: run.json has the runner in use",
    ),
    (
        "0.29",
        "the CPU build keeps the seeds of a batch in which other rows have none; before, they were dropped",
        "default_options.py says so in the log",
    ),
    (
        "0.29",
        "a tool call's arguments that are no JSON object become {} in the prompt, before an error or the list itself",
        "data/prompts/chat.py: with every version",
    ),
    (
        "0.30",
        "whether a chat template takes lists of parts is also read in its macros",
        "data/prompts/content_format.py: with every version",
    ),
    (
        "0.31",
        "choices of several lines are for xgrammar, too, before for guidance, which then compiles all of an engine's "
        "grammars if they came first, and fails on those of calls that a request demands",
        "nowhere: dpgen/README.md says so",
    ),
    (
        "0.31",
        "enable_return_routed_experts is a part of aux_output_config; the old name still sets it",
        "none is needed: both are passed on",
    ),
    (
        "0.31",
        "supports_multimodal_inputs is a property of ModelConfig, before a method of MULTIMODAL_REGISTRY",
        "media/requirements.py: asks the one that there is",
    ),
    (
        "0.32",
        "a chat's system message loses the line x-anthropic-billing-header",
        "data/prompts/chat.py: with every version",
    ),
    (
        "0.32",
        "a parser may want every request adjusted (always_adjust_request), and get_parser takes the tokenizer",
        "parsing/request_parsers.py: asks for both",
    ),
    (
        "0.32",
        "a chat request tells where its reasoning stands (resolve_reasoning_ended), before the server's own code",
        "reasoning.py: does what that code did",
    ),
    (
        "0.33",
        "shutdown of an executor in the engine's process also destroys vLLM's communicators",
        "vllm_backend.py: close calls it only where other processes or caches have to end, in a group all together",
    ),
    (
        "0.33",
        "the CPU's worker no longer fails at its start on too little free memory, only at the KV cache",
        "errors.py: FreeMemory reads both errors",
    ),
    ("0.33", "mamba_cache_mode and ir_op_priority only warn that they have no effect", "none is needed"),
)


def takes_hooks(installed: str) -> bool:
    """Return True for a version of vLLM with which the hooks of `dpgen.engine.vllm.hooks` were compared."""
    return ".".join(installed.split(".")[:2]) in HOOKED


def keeps_seeds_on_cpu(installed: str) -> bool:
    """Return False for a version of vLLM whose CPU build drops the seeds of a batch in which some row has none."""
    numbers = re.match(r"(\d+)\.(\d+)", installed)  # "0.33rc1" is one, and "dev", of a checkout, none
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= (0, 29)


def describe_version(section: str, name: str, installed: str | None) -> str | None:
    """Return the mistake of a field that the installed vLLM doesn't know, but another version does; None for others.

    Args:
        section: `engine`, `sampling` or `sampling_by_rank[0]`.
        name: the key's last part.
        installed: vLLM's version; None if not known.
    """
    table = "engine" if section == "engine" else "sampling"
    here = f"; {installed} is installed" if installed else ""
    if removal := REMOVED[table].get(name):
        return f"unknown key '{section}.{name}': vLLM {removal.version} has removed it; {removal.instead}"
    for version, names in ADDED_IN[table].items():
        if name in names:
            return f"unknown key '{section}.{name}': vLLM {version} and later have it{here}"
    return None
