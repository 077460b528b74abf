"""Write a Llama's configuration and a tokenizer, without weights: for `engine.load_format=dummy`, on a GPU.

    python benchmarks/random_model.py DIR [--size 1b|8b]

The tokenizer is byte-level BPE with 18,510 tokens (every pair and triple of letters), so that detokenizing costs as
much as with a real tokenizer.
"""

from __future__ import annotations

import argparse
import itertools
import string
from pathlib import Path

SIZES = {
    # hidden, layers, heads, KV heads, intermediate: of Llama 3.2 1B and Llama 3.1 8B
    "1b": (2048, 16, 32, 8, 8192),
    "8b": (4096, 32, 32, 8, 14336),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--size", choices=SIZES, default="1b")
    options = parser.parse_args()
    save_random_model(options.directory, options.size)


def save_random_model(directory: Path, size: str) -> Path:
    """Write a model's configuration and tokenizer to a directory, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    hidden, layers, heads, kv_heads, intermediate = SIZES[size]
    letters = string.ascii_lowercase
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    triples = ["".join(triple) for triple in itertools.product(letters, repeat=3)]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *pairs, *triples]
    merges = [(pair[0], pair[1]) for pair in pairs] + [(triple[:2], triple[2]) for triple in triples]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
