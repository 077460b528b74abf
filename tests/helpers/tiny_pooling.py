"""Make random pooling models of two layers: two embedders, a cross-encoder, a classifier, a reward model.

Real vLLM runs each in a few seconds. Their weights are always the same.
"""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from helpers.tiny_tokenizers import save_tokenizer

ENGINE = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 16, "enforce_eager": True}
LABELS = {0: "contradiction", 1: "entailment", 2: "neutral"}

WORDS = "the quick brown fox jumps over a lazy dog hello world where is it what does he do it sleeps runs"
_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def save_tiny_pooling(kind: str, folder: Path, **shape: int) -> Path:
    """Write a model and return its folder.

    Args:
        kind: "bert" and "qwen" embed; "cross" scores pairs; "classes" has three classes; "reward" judges chats.
        shape: of BERT's configuration, instead of the tiny one.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    make = {"bert": partial(_make_bert, **shape), "cross": _make_cross, "classes": _make_classes, "qwen": _make_qwen}
    model = {**make, "reward": _make_reward}[kind](folder)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # wider than at a model's birth, so that different texts get different vectors
            torch.nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return folder


def _load_transformers() -> Any:
    """Return the package without its types, which lack keys of its configurations."""
    return importlib.import_module("transformers")


def _make_bert(folder: Path, **shape: int) -> Any:
    return _load_transformers().BertModel(_configure_bert(folder, **shape), add_pooling_layer=False)


def _make_cross(folder: Path) -> Any:
    return _load_transformers().BertForSequenceClassification(_configure_bert(folder, num_labels=1))


def _make_classes(folder: Path) -> Any:
    labels = {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
    return _load_transformers().BertForSequenceClassification(_configure_bert(folder, **labels))


def _configure_bert(folder: Path, **extra: Any) -> Any:
    num_words = save_bert_tokenizer(folder)
    return _load_transformers().BertConfig(vocab_size=num_words, max_position_embeddings=64, **{**_SHAPE, **extra})


def save_bert_tokenizer(folder: Path) -> int:
    """Write a tokenizer as BERT has it, with [CLS] and [SEP] and types of tokens, and return its number of words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*special, *letters, *(f"##{letter}" for letter in letters), *sorted(set(WORDS.split()) - {"a"}), "?", "."]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    wrapped = _load_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )
    wrapped.save_pretrained(folder)
    return len(words)


def _make_qwen(folder: Path) -> Any:
    """Make a decoder that is an embedder by its files of sentence-transformers, as Qwen3-Embedding is."""
    save_tokenizer("plain", folder)
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    entries = [
        {"idx": int(index), "name": index, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, path, kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    config = _load_transformers().Qwen3Config(
        vocab_size=512, num_key_value_heads=2, head_dim=32, max_position_embeddings=256, is_matryoshka=True, **_SHAPE
    )
    return _load_transformers().Qwen3ForCausalLM(config)


def _make_reward(folder: Path) -> Any:
    save_tokenizer("plain", folder)
    config = _load_transformers().LlamaConfig(
        vocab_size=512,
        num_key_value_heads=4,
        max_position_embeddings=256,
        num_labels=1,
        pad_token_id=0,
        **_SHAPE,
    )
    return _load_transformers().LlamaForSequenceClassification(config)
