"""Read what a model's small files say of it: its context, its sampling, its size. No weights are read.

- Follows vLLM 0.32: `_get_and_verify_max_len` and `get_diff_sampling_param` in `vllm/config/model.py`, and
  `derive_max_model_len_and_key` in `vllm/transformers_utils/model_arch_config_convertor.py`.
- Limits: sizes are those of decoder-only transformers with gated layers, good to a few percent for the usual ones.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpgen.imports import imports_without_gc

logger = logging.getLogger(__name__)

_CONTEXT_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
_DEFAULT_CONTEXT = 2048
# Kinds of rope whose context in config.json has been scaled already.
_SCALED_ROPE = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
_SAMPLING_KEYS = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "min_p"),
    "max_new_tokens",
)
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_BYTES_BY_QUANTIZATION = {"fp8": 1.0, "modelopt": 1.0, "compressed-tensors": 1.0, "mxfp4": 0.55, "modelopt_fp4": 0.55}
_BYTES_BY_QUANTIZATION |= dict.fromkeys(
    ("awq", "gptq", "awq_marlin", "gptq_marlin", "bitsandbytes", "auto-round"), 0.55
)


@dataclass(frozen=True)
class ContextLimit:
    """Hold the tokens that a prompt and its completion may have together, and where the number comes from."""

    num_tokens: int
    origin: str


@dataclass(frozen=True)
class ModelSize:
    """Hold what decides how fast a model generates.

    Attributes:
        num_params: all parameters.
        num_active_params: those that one token uses: fewer in a mixture of experts.
        weight_bytes: of all parameters.
        kv_bytes: bytes of the KV cache for each token.
    """

    num_params: float
    num_active_params: float
    weight_bytes: float
    kv_bytes: float


def load_model_config(model: str, engine: Mapping[str, Any]) -> Any:
    """Return the model's configuration, a `transformers.PretrainedConfig`; None where transformers can't read it.

    Args:
        model: a folder or a name on the Hub.
        engine: fields of vLLM's EngineArgs.
    """
    with imports_without_gc():
        from transformers import AutoConfig

    overrides = engine.get("hf_overrides")
    try:
        return AutoConfig.from_pretrained(
            engine.get("hf_config_path") or model,
            revision=engine.get("revision") or "main",
            trust_remote_code=bool(engine.get("trust_remote_code", False)),
            **(overrides if isinstance(overrides, dict) else {}),
        )
    except Exception as error:  # noqa: BLE001 - a repository's code may raise anything; vLLM reports what is wrong
        logger.debug(f"can't read the configuration of {model}: {error}")
        return None


def find_context_limit(model_config: Any, engine: Mapping[str, Any]) -> ContextLimit | None:
    """Return `max_model_len` as vLLM derives it; None where neither the engine's options nor the model tell.

    Args:
        model_config: as `load_model_config` returns it.
        engine: fields of vLLM's EngineArgs.
    """
    given = engine.get("max_model_len")
    if isinstance(given, int) and given > 0:
        return ContextLimit(given, "engine.max_model_len")
    if model_config is None:
        return None
    limit, origin = _derive_context(model_config, engine)
    return ContextLimit(limit, origin + (", or what fits in memory (engine.max_model_len=-1)" if given == -1 else ""))


def read_generation_config(model: str, model_config: Any, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SamplingParams that vLLM takes from the model's generation config.

    Args:
        model_config: as `load_model_config` returns it.
        engine: fields of vLLM's EngineArgs.
    """
    with imports_without_gc():
        from transformers import GenerationConfig

    source, fields = engine.get("generation_config") or "auto", dict[str, Any]()
    if source != "vllm":
        name = (engine.get("hf_config_path") or model) if source == "auto" else source
        try:
            fields = GenerationConfig.from_pretrained(name, revision=engine.get("revision") or "main").to_diff_dict()
        except Exception as error:  # noqa: BLE001 - most often there is none
            logger.debug(f"can't read the generation config of {name}: {error}")
            if model_config is not None:
                fields = GenerationConfig.from_model_config(model_config).to_diff_dict()
    fields |= engine.get("override_generation_config") or {}
    sampling = {name: fields[name] for name in _SAMPLING_KEYS if fields.get(name) is not None}
    if "max_new_tokens" in sampling:
        sampling["max_tokens"] = sampling.pop("max_new_tokens")
    return sampling


def get_vocabulary_size(model_config: Any) -> int | None:
    """Return the number of token ids that the model has embeddings for; None where its configuration does not tell."""
    size = None if model_config is None else getattr(model_config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def estimate_model_size(model: str, model_config: Any, engine: Mapping[str, Any]) -> ModelSize | None:
    """Return a model's size by its configuration, and by its files where they are in a folder; None if unknown."""
    config = None if model_config is None else model_config.get_text_config()
    try:
        num_params, num_active = _count_params(config)
        kv_values = _count_kv_values(config)
    except (AttributeError, TypeError, ValueError):
        return None
    dtype = str(engine.get("dtype") or "auto")
    dtype = str(getattr(config, "dtype", None)) if dtype == "auto" else dtype
    value_bytes = 4.0 if "float32" in dtype or dtype == "float" else 2.0
    quantization = engine.get("quantization") or _get_quantization(model_config)
    weight_bytes = num_params * _BYTES_BY_QUANTIZATION.get(str(quantization), value_bytes)
    kv_bytes = 1.0 if "fp8" in str(engine.get("kv_cache_dtype")) else value_bytes
    return ModelSize(num_params, num_active, _sum_files(model) or weight_bytes, kv_values * kv_bytes)


def _derive_context(model_config: Any, engine: Mapping[str, Any]) -> tuple[int, str]:
    config = model_config.get_text_config()
    values = {key: getattr(config, key, None) for key in _CONTEXT_KEYS}
    found = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    key = "model_max_length" if found.get("model_max_length") else min(found, key=found.__getitem__, default=None)
    window = getattr(config, "sliding_window", None)
    if engine.get("disable_sliding_window") and window is not None and (key is None or window < found[key]):
        key, found["sliding_window"] = "sliding_window", float(window)
    if key is None or not math.isfinite(found[key]):
        return _DEFAULT_CONTEXT, "vLLM's default, since the model's config.json has none"
    ropes = _list_ropes(model_config)
    if any(rope.get("rope_type") == "longrope" for rope in ropes):
        original = getattr(model_config, "original_max_position_embeddings", None)
        if original is not None:
            return int(original), "original_max_position_embeddings in the model's config.json"
    factor = 1.0
    if "gemma3" not in str(model_config.model_type):
        for rope in ropes:
            if rope.get("rope_type") not in _SCALED_ROPE:
                factor = rope.get("factor") or factor
    scaled = "" if factor == 1 else f" times the rope's factor {factor:g},"
    return int(found[key] * factor), f"{key}{scaled} in the model's config.json"


def _list_ropes(model_config: Any) -> list[dict[str, Any]]:
    """Return the rope parameters, one dict for each type of layer where they differ."""
    parameters = getattr(model_config, "rope_parameters", None) or getattr(model_config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return []
    nested = [item for item in parameters.values() if isinstance(item, dict)]
    return nested or ([parameters] if parameters else [])


def _count_params(config: Any) -> tuple[float, float]:
    """Return the number of all parameters, and of those that one token uses."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    num_experts = next((number for key in _EXPERT_KEYS if (number := getattr(config, key, None))), 0)
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    expert = 3 * hidden * ((getattr(config, "moe_intermediate_size", None) or width) if num_experts else width)
    per_token = getattr(config, "num_experts_per_tok", None) or 1
    shared = getattr(config, "n_shared_experts", None) or 0
    all_experts, active = (num_experts + shared, per_token + shared) if num_experts else (1, 1)
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    embeddings = config.vocab_size * hidden
    return (
        layers * (attention + all_experts * expert) + (1 if is_tied else 2) * embeddings,
        layers * (attention + active * expert) + embeddings,
    )


def _count_kv_values(config: Any) -> float:
    """Return how many numbers the KV cache holds for each token."""
    rank = getattr(config, "kv_lora_rank", None)
    if rank:  # multi-head latent attention
        return float(config.num_hidden_layers * (rank + (getattr(config, "qk_rope_head_dim", None) or 0)))
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return float(2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim)


def _get_quantization(model_config: Any) -> str | None:
    found = getattr(model_config, "quantization_config", None)
    return found.get("quant_method") if isinstance(found, dict) else None


def _sum_files(model: str) -> float:
    """Return the bytes of the safetensors files in a model's folder; 0 where there are none."""
    folder = Path(os.path.expanduser(model))
    return float(sum(path.stat().st_size for path in folder.glob("*.safetensors"))) if folder.is_dir() else 0.0
