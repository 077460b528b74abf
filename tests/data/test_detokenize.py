"""A row's text, decoded at once, is what vLLM decodes token by token."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.jobs import REPO
from helpers.tiny_tokenizers import NAMES, save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpgen.data.detokenize import Detokenizer, fast_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "é", "漢字", "over", "🙂", "lazy", "dog", "<s>", "</s>"]


def sentencepiece_like() -> Any:
    """As Llama 2 has it: a space in front that is no text, and bytes for what has no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "the", "▁fox", "a", "b", "▁a", "▁é", "é"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizer_named(name: str, folder: Path) -> Any:
    if name == "sentencepiece":
        return sentencepiece_like()
    return AutoTokenizer.from_pretrained(
        REPO / "conf" / "demo" / "model" if name == "demo" else save_tokenizer(name, folder / name)
    )


def texts(choose: random.Random, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A prompt and a completion: words, or any tokens at all, cut off anywhere."""

    def some(most: int) -> list[int]:
        if choose.random() < 0.5:
            return [choose.randrange(tokenizer.get_vocab_size()) for _ in range(choose.randrange(most))]
        ids: list[int] = tokenizer.encode(" ".join(choose.choices(WORDS, k=choose.randrange(1, 12)))).ids
        return ids[: choose.randrange(len(ids) + 1)]

    return some(20), some(40)


@pytest.mark.vllm
@pytest.mark.parametrize("name", [*NAMES, "demo", "sentencepiece"])
def test_text_is_what_vllm_makes_of_it(name: str, tmp_path: Path) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    tokenizer = tokenizer_named(name, tmp_path)
    fast = fast_tokenizer(tokenizer)
    assert fast is not None
    ours, choose = Detokenizer(fast), random.Random(0)
    num_broken = 0
    for _ in range(1500):
        prompt, ids = texts(choose, fast)
        skip = choose.random() < 0.7
        params = SamplingParams(skip_special_tokens=skip, spaces_between_special_tokens=True)
        request: Any = SimpleNamespace(request_id="0", sampling_params=params, prompt_token_ids=prompt or [5])
        theirs = FastIncrementalDetokenizer(tokenizer, request)
        theirs.update(list(ids), False)
        expected = theirs.get_next_output_text(True, False)
        assert ours.decode(prompt or [5], ids, skip) == expected, (prompt, ids)
        num_broken += "\ufffd" in expected
    assert num_broken > 20 or name in ("parts",), "bytes that are no character were among them"


def test_a_slow_tokenizer_is_left_to_vllm() -> None:
    assert fast_tokenizer(object()) is None
