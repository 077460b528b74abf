"""The texts of single tokens are those that vLLM's server shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_tokenizers import save_tokenizer

from dpgen.data.token_texts import TokenTexts

TEXT = "hello é€😀 there\nx"


class SpaceMarks:
    """A tokenizer whose tokens stand for their first space by a mark, which `decode` drops."""

    words = ("▁hello", "▁▁x", "y")

    class backend_tokenizer:  # the name that transformers gives it
        @staticmethod
        def to_str() -> str:
            return '{"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}}'

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.words[token_id] for token_id in token_ids).replace("▁", " ").removeprefix(" ")

    def convert_ids_to_tokens(self, token_ids: list[int]) -> list[str]:
        return [self.words[token_id] for token_id in token_ids]


def test_the_texts_of_all_tokens_make_the_whole_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer("plain", tmp_path / "plain"))
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    texts = TokenTexts(tokenizer)
    parts = [texts.get(token_ids[:position], token_id) for position, token_id in enumerate(token_ids)]
    assert "".join(parts) == TEXT
    assert parts.count("") == 1 + 2 + 3, "a character's bytes but the last have no text"


def test_leading_spaces_stay() -> None:
    texts = TokenTexts(SpaceMarks())
    assert [texts.get([], token_id) for token_id in (0, 1, 2)] == [" hello", "  x", "y"]


def test_tokens_without_a_tokenizer_are_ids() -> None:
    assert TokenTexts().get([], 7) == "token_id:7"


@pytest.mark.vllm
@pytest.mark.slow
def test_the_texts_are_those_of_vllm(tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
    from vllm.v1.engine.logprobs import LogprobsProcessor

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer("plain", tmp_path / "plain"))
    processor = LogprobsProcessor(tokenizer, None, None, None, None, None)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    texts = TokenTexts(tokenizer)
    for position in range(len(token_ids)):
        before = token_ids[max(0, position - 4) : position]
        candidates = [token_ids[position], *range(3, 200, 7)]
        alone = convert_ids_list_to_tokens(tokenizer, candidates)
        expected = processor._verify_tokens(alone, candidates, before)
        assert [texts.get(before, token_id) for token_id in candidates] == expected
