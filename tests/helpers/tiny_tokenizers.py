"""Build tokenizers that are small enough for a test, each with a feature that prompt rendering easily gets wrong.

| name    | tokens          | adds             | chat template                                              |
|---------|-----------------|------------------|------------------------------------------------------------|
| `plain` | byte-level BPE  | nothing          | ChatML with tools and reasoning, string content            |
| `bos`   | byte-level BPE  | `<s>` in front   | writes `<s>` as well; strict about roles, string content   |
| `parts` | single letters  | `<s>` and `</s>` | loops over the parts of a content, knows a developer role  |

`mistral` is a tekken.json, which only mistral-common reads.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

NAMES = ("plain", "bos", "parts")

_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello there",
    "user assistant system tool",
]

_CHATML = """\
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + ('(' + message.name + ')' if message.name is defined else '') + '\n' }}
{%- if message.reasoning_content is defined %}
{{- '<think>' + message.reasoning_content + '</think>' }}
{%- endif %}
{{- message.content }}
{%- if message.tool_calls is defined %}
{%- for call in message.tool_calls %}
{{- '<call>' + call.function.name + (call.function.arguments | tojson) + (call | tojson) }}
{%- endfor %}
{%- endif %}
{%- if message.tool_call_id is defined %}{{ '#' + message.tool_call_id }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}
{%- endif %}"""

_STRICT = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ('system', 'user', 'assistant') %}
{{- raise_exception('this template knows no role ' + message['role']) }}
{%- elif message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}
{%- endfor %}"""

_PARTS = """\
{%- macro show(content) %}
{%- if content is string %}{{ content }}
{%- else %}
{%- for part in content %}[{{ part.type }}:{{ part.text or part.name }}{{ part.mark }}]{% endfor %}
{%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- for message in messages %}
{{- message.role }}{% if message.role == 'developer' %}{{ message.tools }}{% endif %}:
{{- show(message.content) }};
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def save_tokenizer(name: str, folder: Path) -> Path:
    """Build the tokenizer in a folder, laid out like a model's repository, and return the folder."""
    if name == "mistral":
        _save_tekken(folder)
    else:
        {"plain": _make_plain, "bos": _make_bos, "parts": _make_parts}[name]().save_pretrained(folder)
    return folder


def add_special_tokens(folder: Path, *tokens: str) -> None:
    """Give the tokenizer in a folder more special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)


def _make_byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer, chat_template: str, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def _make_plain() -> PreTrainedTokenizerFast:
    tokenizer = _make_byte_level(["<|im_start|>", "<|im_end|>", "<|end|>"])
    return _wrap(tokenizer, _CHATML, eos_token="<|end|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"])


def _make_bos() -> PreTrainedTokenizerFast:
    tokenizer = _make_byte_level(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(tokenizer, _STRICT, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _make_parts() -> PreTrainedTokenizerFast:
    letters = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(32, 127)), "\n", "é"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return _wrap(tokenizer, _PARTS, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _save_tekken(folder: Path) -> None:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    special += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
    special += ["[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
    pieces = [bytes([code]) for code in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    config = {
        "pattern": r"[^\s]+|\s+",
        "num_vocab_tokens": len(pieces),
        "default_vocab_size": len(pieces) + len(special),
        "default_num_special_tokens": len(special),
        "version": "v7",
    }
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    control = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)]
    tekken = {"config": config, "vocab": vocabulary, "special_tokens": control}
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(tekken))


def save_model_without_weights(folder: Path, tokenizer: str = "plain", **config: Any) -> Path:
    """Build a folder that passes for a Llama's as long as nobody loads its weights: a file that holds no tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 128}
    llama |= {"intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    llama |= {"max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps({**llama, **config}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder
