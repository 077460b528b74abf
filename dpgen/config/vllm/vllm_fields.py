"""Say what became of a field that vLLM's EngineArgs or SamplingParams doesn't know.

- The tables hold names of vLLM before 0.26, of Hugging Face's `generate` and of OpenAI's API, each with what to write
  instead in vLLM 0.26 to 0.33 (`dpgen.engine.vllm.versions` has what went since). They count only where vLLM doesn't
  know the name: they reject nothing.
- Any other name gets the nearest legal one, if one is near.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from dpgen.errors import suggest_name

_STRUCTURED = "sampling.structured_outputs={{{0}: ...}}"
_NO_BEAM_SEARCH = "SamplingParams has no beam search; leave it out"
_ADAPTERS = "write lora={NAME: PATH}, and data.lora_column where rows have different ones"
_GONE = "vLLM has removed it without a successor; leave it out"
_SPECULATIVE = "write engine.speculative_config={model: ..., num_speculative_tokens: ...}"
_EPLB = "write engine.eplb_config={...}"

_SAMPLING = {
    **{f"guided_{kind}": f"write {_STRUCTURED.format(kind)}" for kind in ("json", "regex", "choice", "grammar")},
    **{kind: f"write {_STRUCTURED.format(kind)}" for kind in ("json", "regex", "choice", "grammar", "structural_tag")},
    "guided_json_object": "write sampling.structured_outputs={json_object: true}",
    "guided_whitespace_pattern": f"write {_STRUCTURED.format('whitespace_pattern')}",
    "guided_decoding": f"write {_STRUCTURED.format('json')}",
    "guided_decoding_backend": "write engine.structured_outputs_config={backend: ...}",
    "response_format": f"write {_STRUCTURED.format('json')}",
    "best_of": "vLLM has removed it; sampling.n samples are all returned",
    **dict.fromkeys(
        ("use_beam_search", "beam_width", "num_beams", "length_penalty", "early_stopping"), _NO_BEAM_SEARCH
    ),
    **dict.fromkeys(("lora_request", "lora_path", "lora_name"), _ADAPTERS),
    "prompt_adapter_request": _GONE,
    "logits_processors": "write engine.logits_processors=[...]: they belong to the engine, not to a request",
    "truncate_prompt_tokens": "dpgen shortens no prompt; a row that is too long gets the error prompt_too_long",
    **dict.fromkeys(
        ("max_new_tokens", "max_completion_tokens", "max_length", "max_gen_len"), "write sampling.max_tokens"
    ),
    **dict.fromkeys(("min_new_tokens", "min_length"), "write sampling.min_tokens"),
    **dict.fromkeys(("num_return_sequences", "num_samples"), "write sampling.n"),
    "do_sample": "write sampling.temperature=0 for greedy sampling",
    **dict.fromkeys(("stop_sequences", "stop_strings", "stop_words"), "write sampling.stop=[...]"),
    **dict.fromkeys(("eos_token_id", "stop_token_id"), "write sampling.stop_token_ids=[...]"),
    "top_logprobs": "write sampling.logprobs",
    **dict.fromkeys(("random_seed", "manual_seed"), "write run.seed"),
    **dict.fromkeys(
        ("chat_template_kwargs", "enable_thinking", "thinking"),
        "write data.chat_template_kwargs={enable_thinking: ...}",
    ),
    **{name: f"write data.{name}" for name in ("add_generation_prompt", "continue_final_message", "chat_template")},
}

_ENGINE = {
    "guided_decoding_backend": "write engine.structured_outputs_config={backend: ...}",
    **{
        f"guided_decoding_disable_{name}": "write engine.structured_outputs_config={...}"
        for name in ("fallback", "any_whitespace", "additional_properties")
    },
    **dict.fromkeys(
        ("max_seq_len_to_capture", "max_context_len_to_capture", "cuda_graph_sizes"),
        "write engine.cudagraph_capture_sizes=[...] or engine.max_cudagraph_capture_size",
    ),
    **dict.fromkeys(("full_cuda_graph", "use_cudagraph"), "write engine.compilation_config={cudagraph_mode: ...}"),
    **dict.fromkeys(
        ("speculative_model", "num_speculative_tokens", "speculative_draft_tensor_parallel_size",
         "ngram_prompt_lookup_max", "ngram_prompt_lookup_min"),
        _SPECULATIVE,
    ),
    **dict.fromkeys(("rope_scaling", "rope_theta"), "write engine.hf_overrides={rope_parameters: {...}}"),
    "override_pooler_config": "write engine.pooler_config",
    "disable_mm_preprocessor_cache": "write engine.mm_processor_cache_gb=0",
    "enable_multimodal_encoder_data_parallel": "write engine.mm_encoder_tp_mode=data",
    **dict.fromkeys(
        ("num_redundant_experts", "eplb_window_size", "eplb_step_interval", "eplb_log_balancedness"), _EPLB
    ),
    "enable_reasoning": "write engine.reasoning_parser",
    "task": "write task=embed, classify, score or reward, a key beside engine; for text leave it out",
    **dict.fromkeys(("disable_log_requests", "enable_log_requests"), "dpgen logs no requests; leave it out"),
    "device": "vLLM finds the devices itself; leave it out",
    **dict.fromkeys(
        ("swap_space", "use_v2_block_manager", "num_lookahead_slots", "num_scheduler_steps",
         "multi_step_stream_outputs", "preemption_mode", "scheduler_delay_factor", "worker_use_ray",
         "disable_async_output_proc", "tokenizer_pool_size", "tokenizer_pool_type", "tokenizer_pool_extra_config",
         "lora_extra_vocab_size", "long_lora_scaling_factors", "enable_prompt_adapter", "max_prompt_adapters",
         "max_prompt_adapter_token", "qlora_adapter_name_or_path", "quantization_param_path",
         "override_neuron_config"),
        _GONE,
    ),
    **dict.fromkeys(("lora_modules", "lora_path", "adapter"), _ADAPTERS),
    "use_tqdm": "write engine.use_tqdm_on_load",
    "torch_dtype": "write engine.dtype",
    **dict.fromkeys(
        ("max_seq_len", "max_length", "max_context_length", "context_length"), "write engine.max_model_len"
    ),
    **dict.fromkeys(("batch_size", "max_batch_size"), "write engine.max_num_seqs"),
    **dict.fromkeys(("tp", "tp_size", "num_gpus"), "write parallel.tensor_parallel_size"),
    **dict.fromkeys(("pp", "pp_size"), "write parallel.pipeline_parallel_size"),
    **dict.fromkeys(("dp", "dp_size"), "data parallelism comes from dpgen's ranks: start more of them"),
    "chat_template": "write data.chat_template",
}  # fmt: skip

# Fields that a user may give without their section.
_COMMON = {
    **dict.fromkeys(
        ("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "n", "stop", "stop_token_ids",
         "repetition_penalty", "presence_penalty", "frequency_penalty", "structured_outputs", "logprobs"),
        "sampling",
    ),
    **dict.fromkeys(
        ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "dtype", "quantization",
         "enforce_eager", "enable_prefix_caching", "trust_remote_code", "kv_cache_dtype", "hf_token"),
        "engine",
    ),
}  # fmt: skip


# Names that other tools have for keys of dpgen.
_OURS = {
    **dict.fromkeys(("output_dir", "out_dir", "output_path", "save_dir"), "write run.dir"),
    **dict.fromkeys(("num_rows", "max_rows", "max_samples", "num_examples"), "write data.limit"),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "input", "input_path"), "write data.path"),
    "prompt_template": "write data.template",
    **dict.fromkeys(("system", "system_message"), "write data.system_prompt"),
    "data_parallel_size": "data parallelism comes from dpgen's ranks: start more of them",
}


def describe_unknown_field(section: str, name: str, legal: Collection[str], other: Collection[str] = ()) -> str:
    """Return the mistake of a key in a passed-through section that vLLM doesn't know.

    Args:
        section: `engine`, `sampling` or `sampling_by_rank[0]`.
        name: the key's last part.
        legal: the section's fields.
        other: the fields of the other one of `engine` and `sampling`.
    """
    full, is_engine = f"{section}.{name}", section == "engine"
    successor = (_ENGINE if is_engine else _SAMPLING).get(name)
    if successor is None and name in other:
        successor = f"write {'sampling' if is_engine else 'engine'}.{name}"
    if successor is not None:
        return f"unknown key {full!r}: {successor}"
    return f"unknown key {full!r}{suggest_name(full, sorted(f'{section}.{field}' for field in legal), 'keys')}"


def iter_old_fields(section: str) -> Iterator[tuple[str, str]]:
    """Yield each name that vLLM does not know, or no longer, with what to write instead.

    Args:
        section: `engine`, `sampling` or `sampling_by_rank`.
    """
    yield from (_ENGINE if section == "engine" else _SAMPLING).items()


def describe_home_of_field(name: str, legal: Collection[str]) -> str:
    """Return the end of a sentence about a key that stands in the wrong section; "" if its home is not known.

    Args:
        name: the key's last part.
        legal: the configuration's keys. One that ends in the name is left to `suggest_name`.
    """
    if section := _COMMON.get(name):
        return f"; write {section}.{name}"
    if any(key.rpartition(".")[2] == name for key in legal):
        return ""
    homes = {table[name] for table in (_OURS, _ENGINE, _SAMPLING) if name in table}
    return f"; {homes.pop()}" if len(homes) == 1 else ""
