"""Make LoRA adapters with random weights for the models of `helpers.tiny_model`, without peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# Inputs and outputs of the modules, in the model of `save_tiny_model`.
_WIDTHS = {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (128, 128), "mlp.down_proj": (256, 128)}
NUM_LAYERS = 2


def save_adapter(folder: Path, seed: int = 0, rank: int = 8, num_layers: int = NUM_LAYERS, **config: Any) -> Path:
    """Write an adapter that visibly changes the model's text, and return its folder.

    Args:
        config: keys of adapter_config.json to add or replace; None removes one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(num_layers):
        for module, (num_inputs, num_outputs) in _WIDTHS.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = random.normal(0, 0.5, (rank, num_inputs)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(0, 0.5, (num_outputs, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [module.rpartition(".")[2] for module in _WIDTHS]
    defaults = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules, "bias": "none"}
    kept = {key: value for key, value in (defaults | config).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder
