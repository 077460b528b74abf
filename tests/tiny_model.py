"""A random Llama of two layers, with a tokenizer: small enough for a test, and real vLLM runs it."""

from __future__ import annotations

from pathlib import Path

from tiny_tokenizers import save_tokenizer

ENGINE = {
    "dtype": "float32",  # in which the CPU's results don't depend on the batch, and so can be compared
    "max_model_len": 256,
    "max_num_seqs": 32,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}


def save_tiny_model(folder: Path, tokenizer: str = "bos", max_model_len: int = 256) -> Path:
    """Writes the model and returns its folder; the same weights every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max_model_len,
        bos_token_id=1,  # as in each of the tokenizers
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
