"""What a model's small files say: its context, its sampling and its size, as vLLM reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_tokenizers import save_model_without_weights

from dpgen.data.model_facts import (
    ContextLimit,
    estimate_model_size,
    find_context_limit,
    get_vocabulary_size,
    load_model_config,
    read_generation_config,
)

ROPE = {"rope_theta": 10000.0}
# config.json's own keys, engine options, max_model_len
CONTEXTS: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({}, {}, 256),
    ({}, {"max_model_len": 100}, 100),
    ({}, {"max_model_len": -1}, 256),
    ({"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}, {}, 1024),
    ({"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, {}, 512),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {}, 1024),
    (
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {},
        256,
    ),
    ({"model_max_length": 512}, {}, 512),
    ({"seq_length": 128}, {}, 128),
    ({"model_type": "mistral", "sliding_window": 64}, {}, 256),
    ({"model_type": "mistral", "sliding_window": 64}, {"disable_sliding_window": True}, 64),
    ({}, {"hf_overrides": {"max_position_embeddings": 77}}, 77),
]
GENERATION: list[tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = [
    (None, {}, {}),
    ({"temperature": 0.6, "top_k": 20, "eos_token_id": 2}, {}, {"temperature": 0.6, "top_k": 20}),
    ({"temperature": 0.6, "max_new_tokens": 5}, {}, {"temperature": 0.6, "max_tokens": 5}),
    ({"temperature": 0.6}, {"generation_config": "vllm"}, {}),
    ({"temperature": 0.6}, {"override_generation_config": {"temperature": 0.1}}, {"temperature": 0.1}),
]


def make_model(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> str:
    model = save_model_without_weights(folder / "model", **config)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    return str(model)


@pytest.mark.parametrize(("config", "engine", "expected"), CONTEXTS)
def test_the_context_is_derived_from_the_model_s_config(
    config: dict[str, Any], engine: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    found = find_context_limit(load_model_config(make_model(tmp_path, config), engine), engine)
    assert found is not None and found.num_tokens == expected
    assert "config.json" in found.origin or found.origin == "engine.max_model_len"


def test_a_model_that_cannot_be_read_has_no_known_context(tmp_path: Path) -> None:
    config = load_model_config(str(tmp_path / "nowhere"), {})
    assert config is None and find_context_limit(config, {}) is None
    assert find_context_limit(None, {"max_model_len": 9}) == ContextLimit(9, "engine.max_model_len")
    assert get_vocabulary_size(None) is None and estimate_model_size("x", None, {}) is None


@pytest.mark.parametrize(("generation", "engine", "expected"), GENERATION)
def test_sampling_comes_from_the_generation_config(
    generation: dict[str, Any] | None, engine: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(tmp_path, {}, generation)
    assert read_generation_config(model, load_model_config(model, engine), engine) == expected


@pytest.mark.parametrize(
    ("config", "params", "active", "kv_bytes"),
    [
        (
            {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
            | {"num_attention_heads": 32, "num_key_value_heads": 8},
            8.03e9,
            7.5e9,
            131_072,
        ),
        (
            {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48}
            | {"moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
            | {"num_experts": 128, "num_experts_per_tok": 8},
            30.5e9,
            3.0e9,
            98_304,
        ),
    ],
    ids=["llama 8B", "qwen3 30B-A3B"],
)
def test_the_size_is_counted_from_the_config(
    config: dict[str, Any], params: float, active: float, kv_bytes: int, tmp_path: Path
) -> None:
    loaded = load_model_config(make_model(tmp_path, {"dtype": "bfloat16", **config}), {})
    size = estimate_model_size("elsewhere", loaded, {})
    assert size is not None
    assert size.num_params == pytest.approx(params, rel=0.01) and size.num_active_params == pytest.approx(
        active, rel=0.02
    )
    assert size.weight_bytes == pytest.approx(2 * params, rel=0.01) and size.kv_bytes == kv_bytes
    eight_bits = estimate_model_size("elsewhere", loaded, {"quantization": "fp8", "kv_cache_dtype": "fp8"})
    assert eight_bits is not None
    assert (eight_bits.weight_bytes, eight_bits.kv_bytes) == (size.weight_bytes / 2, kv_bytes / 2)


# ---- against vLLM itself


@pytest.mark.vllm
def test_context_and_sampling_are_those_that_vllm_derives(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    cases: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]]
    cases = [(config, engine, None) for config, engine, _ in CONTEXTS] + [
        ({}, engine, generation) for generation, engine, _ in GENERATION
    ]
    for number, (config, engine, generation) in enumerate(cases):
        model = make_model(tmp_path / str(number), config, generation)
        by_vllm = EngineArgs(model=model, dtype="float32", **engine).create_model_config()
        loaded = load_model_config(model, engine)
        limit = find_context_limit(loaded, engine)
        assert limit is not None and limit.num_tokens == by_vllm.max_model_len, (config, engine)
        assert read_generation_config(model, loaded, engine) == by_vllm.get_diff_sampling_param(), (generation, engine)
        assert get_vocabulary_size(loaded) == by_vllm.get_vocab_size()
