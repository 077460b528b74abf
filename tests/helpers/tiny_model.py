"""Make a random Llama of two layers with a tokenizer: small enough for a test, and real vLLM runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from helpers.jobs import REPO
from helpers.tiny_tokenizers import save_tokenizer

ENGINE = {
    "dtype": "float32",  # so that the CPU's results don't depend on the batch, and can be compared
    "max_model_len": 256,
    "max_num_seqs": 32,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}


def save_tiny_model(folder: Path, tokenizer: str = "bos", max_model_len: int = 256) -> Path:
    """Write the model and return its folder; the weights are always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(folder, tokenizer, LlamaForCausalLM, LlamaConfig, max_position_embeddings=max_model_len)


def save_tiny_moe(folder: Path) -> Path:
    """Write the same model with four experts in each layer, two of them active for a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return _save(
        folder,
        "bos",
        MixtralForCausalLM,
        MixtralConfig,
        max_position_embeddings=256,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
    )


def write_large_cache_model(folder: Path) -> Path:
    """Write the configuration of a Llama with 64 KiB of KV cache a token, for `load_format=dummy`; return its folder.

    For caches as large as a GPU, which holds so many tokens of a tiny model that vLLM's blocks would take minutes. Its
    tokenizer is the demo's.
    """
    demo = REPO / "conf" / "demo" / "model"
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((demo / "config.json").read_text())
    config |= {"hidden_size": 256, "num_hidden_layers": 16, "head_dim": 128, "dtype": "bfloat16"}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_tiny_qwen3_moe(folder: Path) -> Path:
    """Write a random Qwen3-MoE of two layers with 16 experts, two of them active for a token, in bfloat16.

    Its dimensions are such that vLLM's kernels for GPUs take them, and that two or four GPUs can divide them.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return _save(
        folder,
        "bos",
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_attention_heads=8,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        dtype="bfloat16",
    )


def _save(folder: Path, tokenizer: str, model_class: Any, config_class: Any, **extra: Any) -> Path:
    import torch
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    dimensions = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = config_class(**{**dimensions, **extra}, bos_token_id=loaded.bos_token_id, eos_token_id=loaded.eos_token_id)
    model = model_class(config)
    if "dtype" in extra:
        model = model.to(getattr(torch, extra["dtype"]))
    model.save_pretrained(folder)
    return folder


def quantize(folder: Path) -> None:
    """Turn the model's linear layers into 8-bit integers with a scale for each output (W8A8, compressed-tensors)."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    quantized = {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            quantized[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        quantized[name] = torch.round(weight / scale).to(torch.int8)
        quantized[f"{name}_scale"] = scale
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
