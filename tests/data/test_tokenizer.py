"""The tokens of a text are those of the tokenizer of transformers, however they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_pooling import save_bert_tokenizer
from helpers.tiny_tokenizers import save_tokenizer

from dpgen.data.tokenizer import make_encoder

TEXTS = ("", "hello world", "the quick  brown\nfox é\u2028", "[SEP] </s> <|im_end|>", "x" * 700)


@pytest.mark.parametrize("kind", ["plain", "bos", "parts", "bert"])
def test_tokens_are_those_of_transformers_whatever_was_cut_before(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    if kind == "bert":
        save_bert_tokenizer(tmp_path)
    else:
        save_tokenizer(kind, tmp_path)
    tokenizer, other = (AutoTokenizer.from_pretrained(tmp_path) for _ in range(2))
    encode = make_encoder(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for prepare in (
        lambda: None,
        lambda: tokenizer("a b c d", truncation=True, max_length=3),
        lambda: tokenizer(["a", "b c d"], padding=True),
        lambda: tokenizer("</s>", split_special_tokens=True),
    ):
        for text in TEXTS:
            for adds_special_tokens in (True, False):
                prepare()
                expected = other(text, add_special_tokens=adds_special_tokens)["input_ids"]
                assert encode(text, adds_special_tokens) == expected, (text, adds_special_tokens)


def test_a_tokenizer_with_code_of_its_own_is_asked_itself() -> None:
    class Own:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, Any]:
            return {"input_ids": (len(text), add_special_tokens)}

    assert make_encoder(Own())("abc", True) == [3, True]
