"""List the fields of vLLM's EngineArgs and SamplingParams that matter for generating text, with their JSON types.

Editors and shells suggest these names. They reject nothing: vLLM itself knows which fields its version has. A test
compares the names with the installed vLLM.
"""

from __future__ import annotations

from typing import Any

# Type in JSON Schema → fields, in alphabetical order.
ENGINE_TYPES: dict[str, str] = {
    "integer": "block_size decode_context_parallel_size kv_cache_memory_bytes long_prefill_token_threshold "
    "max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_rank max_loras max_model_len "
    "max_num_batched_tokens max_num_seqs max_parallel_loading_workers num_gpu_blocks_override "
    "prefill_context_parallel_size stream_interval",
    "number": "cpu_offload_gb gpu_memory_utilization kv_offloading_size mm_processor_cache_gb",
    "boolean": "async_scheduling disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce "
    "disable_hybrid_kv_cache_manager disable_log_stats disable_sliding_window enable_chunked_prefill enable_dbo "
    "enable_eplb enable_lora enable_prefix_caching enable_sleep_mode enforce_eager fully_sharded_loras "
    "language_model_only skip_mm_profiling skip_tokenizer_init trust_remote_code use_tqdm_on_load",
    "string": "all2all_backend attention_backend code_revision config_format convert download_dir dtype "
    "generation_config hf_config_path kv_cache_dtype kv_offloading_backend load_format logprobs_mode lora_dtype "
    "mm_encoder_tp_mode model_impl moe_backend quantization reasoning_parser revision runner safetensors_load_strategy "
    "scheduling_policy tokenizer tokenizer_mode tokenizer_revision",
    "array": "cudagraph_capture_sizes logits_processors lora_target_modules",
    "object": "additional_config attention_config compilation_config eplb_config hf_overrides kernel_config "
    "kv_transfer_config limit_mm_per_prompt media_io_kwargs mm_processor_kwargs model_loader_extra_config "
    "override_generation_config pooler_config speculative_config structured_outputs_config",
    "string or array": "served_model_name",
}
SAMPLING_TYPES: dict[str, str] = {
    "integer": "logprobs max_tokens min_tokens n prompt_logprobs seed thinking_token_budget top_k",
    "number": "frequency_penalty min_p presence_penalty repetition_penalty temperature top_p",
    "boolean": "detokenize ignore_eos include_stop_str_in_output skip_special_tokens spaces_between_special_tokens",
    "array": "allowed_token_ids bad_words logprob_token_ids stop_token_ids",
    "object": "extra_args logit_bias repetition_detection structured_outputs",
    "string or array": "stop",
}
# Values that all of vLLM 0.26 to 0.33 take; there may be more.
ENGINE_VALUES = {
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "kv_cache_dtype": ("auto", "fp8", "fp8_e4m3", "fp8_e5m2"),
    "load_format": ("auto", "dummy", "safetensors", "runai_streamer", "tensorizer"),
    "model_impl": ("auto", "vllm", "transformers"),
    "scheduling_policy": ("fcfs", "priority"),
    "tokenizer_mode": ("auto", "hf", "mistral"),
}


def list_fields(types: dict[str, str]) -> dict[str, list[str]]:
    """Return the JSON types of each field, by its name, in alphabetical order."""
    found: dict[str, Any] = {name: type.split(" or ") for type, names in types.items() for name in names.split()}
    return dict(sorted(found.items()))
