"""A row's text, decoded at once, equals the text that vLLM decodes token by token."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.jobs import REPO
from helpers.tiny_tokenizers import NAMES, save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpgen.data.detokenize import Detokenizer, fast_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "é", "漢字", "over", "🙂", "lazy", "dog", "<s>", "</s>"]


def make_sentencepiece_like() -> Any:
    """Return a tokenizer like Llama 2's: a space in front that is not text, bytes for characters without a token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "the", "▁fox", "a", "b", "▁a", "▁é", "é"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def load_named_tokenizer(name: str, folder: Path) -> Any:
    if name == "sentencepiece":
        return make_sentencepiece_like()
    from transformers import AutoTokenizer  # takes seconds

    return AutoTokenizer.from_pretrained(
        REPO / "conf" / "demo" / "model" if name == "demo" else save_tokenizer(name, folder / name)
    )


def draw_prompt_and_completion(rng: random.Random, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and a completion: words, or arbitrary tokens, cut off anywhere."""

    def draw(max_tokens: int) -> list[int]:
        if rng.random() < 0.5:
            return [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(max_tokens))]
        ids: list[int] = tokenizer.encode(" ".join(rng.choices(WORDS, k=rng.randrange(1, 12)))).ids
        return ids[: rng.randrange(len(ids) + 1)]

    return draw(20), draw(40)


@pytest.mark.vllm
@pytest.mark.parametrize("name", [*NAMES, "demo", "sentencepiece"])
def test_the_text_of_a_row_equals_the_text_that_vllm_makes_of_it(name: str, tmp_path: Path) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    tokenizer = load_named_tokenizer(name, tmp_path)
    fast = fast_tokenizer(tokenizer)
    assert fast is not None
    ours, rng = Detokenizer(fast), random.Random(0)
    num_broken = 0
    for _ in range(1500):
        prompt, ids = draw_prompt_and_completion(rng, fast)
        skip = rng.random() < 0.7
        params = SamplingParams(skip_special_tokens=skip, spaces_between_special_tokens=True)
        request: Any = SimpleNamespace(request_id="0", sampling_params=params, prompt_token_ids=prompt or [5])
        theirs = FastIncrementalDetokenizer(tokenizer, request)
        theirs.update(list(ids), False)
        expected = theirs.get_next_output_text(True, False)
        assert ours.decode(prompt or [5], ids, skip) == expected, (prompt, ids)
        num_broken += "\ufffd" in expected
    assert num_broken > 20 or name in ("parts",), "the texts must include bytes that are not a character"


def test_vllm_decodes_for_a_slow_tokenizer() -> None:
    assert fast_tokenizer(object()) is None
