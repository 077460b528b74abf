"""Give the text of single tokens, as vLLM's server shows them beside log-probabilities.

- Follows vLLM 0.32: `vllm/tokenizers/detokenizer_utils.py` (convert_ids_list_to_tokens), `vllm/v1/engine/logprobs.py`
  (_correct_decoded_token): a token that ends within a character has no text; the one that completes it has all of it.
- Without a tokenizer, a token is `token_id:N`, which the server writes where it is asked for ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_REPLACEMENT_CHAR = "\ufffd"  # stands for bytes that are not a character
_MAX_CONTEXT_TOKENS = 4  # no character has more bytes


class TokenTexts:
    """Give the text of single tokens.

    Args:
        tokenizer: of transformers; None for none.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self._space_mark = None if tokenizer is None else _find_space_mark(tokenizer)
        self._texts: dict[int, str] = {}  # of tokens alone

    def get(self, before: Sequence[int], token_id: int) -> str:
        """Return a token's text.

        Args:
            before: the tokens before it; the last four are enough.
        """
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        text = self._decode_alone(token_id)
        return self._complete(before[-_MAX_CONTEXT_TOKENS:], token_id) if text.endswith(_REPLACEMENT_CHAR) else text

    def _decode_alone(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = str(self._tokenizer.decode([token_id]) or "")
            if self._space_mark is not None:
                raw = str(self._tokenizer.convert_ids_to_tokens([token_id])[0] or "")
                num_spaces = len(raw) - len(raw.lstrip(self._space_mark))
                text = " " * max(0, num_spaces - (len(text) - len(text.lstrip(" ")))) + text
            self._texts[token_id] = text
        return text

    def _complete(self, before: Sequence[int], token_id: int) -> str:
        """Return the text of a token that ends with the bytes of a character; "" if these are not all of them."""
        for count in range(1, len(before) + 1):
            context = list(before[-count:])
            both = str(self._tokenizer.decode([*context, token_id]))
            if both.endswith(_REPLACEMENT_CHAR):
                continue
            while context and str(self._tokenizer.decode([context[-1]])).endswith(_REPLACEMENT_CHAR):
                context.pop()  # its bytes belong to this character
            prefix = str(self._tokenizer.decode(context)) if context else ""
            common = next((i for i, (a, b) in enumerate(zip(prefix, both, strict=False)) if a != b), len(prefix))
            return both[common:]
        return ""


def _find_space_mark(tokenizer: Any) -> str | None:
    """Return the character that stands for a space in tokens, where `decode` drops the first space; else None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    pre_tokenizer = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    for part in (pre_tokenizer, *pre_tokenizer.get("pretokenizers", ())):
        if part.get("type") == "Metaspace":
            return str(part.get("replacement", "\u2581"))
    return None
