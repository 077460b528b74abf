"""Write log-probabilities in the two forms of OpenAI's API, with the entries that vLLM's server chooses.

- Follows vLLM 0.32: `chat_completion/serving.py` (_create_chat_logprobs), `completion/serving.py`
  (_create_completion_logprobs). The sampled token is the first candidate, whatever its rank.
- A token without a log-probability is null in completions.
- Numbers are the shortest decimals that float32 reads back as the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from dpgen.data.token_texts import TokenTexts
from dpgen.logprobs import TokenLogprobs
from dpgen.output.column_values import escape_surrogates, to_shortest_decimals

_LOWEST = -9999.0  # in place of minus infinity, as in vLLM's server

Candidate = tuple[int, float, str]  # a token, its log-probability and its text


def build_chat_logprobs(logprobs: TokenLogprobs, texts: TokenTexts, k: int | None) -> dict[str, Any]:
    """Return `choices[].logprobs` of a chat completion.

    Args:
        k: the request's `top_logprobs`.
    """
    content = []
    for (_, value, text), candidates in _iter_positions(logprobs, texts):
        kept = candidates[: k or 0]
        top = [_build_chat_token(other_text, other_value) for _, other_value, other_text in kept]
        content.append(_build_chat_token(text, value) | {"top_logprobs": top})
    return {"content": content}


def build_completion_logprobs(parts: Iterable[TokenLogprobs], texts: TokenTexts, k: int) -> dict[str, Any]:
    """Return `choices[].logprobs` of a completion.

    Args:
        parts: the tokens of the text, in order: those of an echoed prompt, and the generated ones.
        k: the request's `logprobs`.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    offset = 0
    for logprobs in parts:
        for position, ((_, value, text), candidates) in enumerate(_iter_positions(logprobs, texts)):
            has_value = not math.isnan(logprobs.logprobs[position])
            tokens.append(text)
            values.append(value if has_value else None)
            top = {other_text: other_value for _, other_value, other_text in candidates[: k + 1]}
            tops.append(top if has_value else None)
            offsets.append(offset)
            offset += len(text)
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def build_prompt_logprobs(logprobs: TokenLogprobs, texts: TokenTexts) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: for each token its candidates by id; null for the first one.

    `rank` is null for a token that is none of the most likely ones: it is not kept.
    """
    positions: list[dict[str, Any] | None] = []
    for position, ((token_id, value, text), candidates) in enumerate(_iter_positions(logprobs, texts)):
        if math.isnan(logprobs.logprobs[position]):
            positions.append(None)
            continue
        ranks = {other_id: rank for rank, other_id in enumerate(_get_top_ids(logprobs, position), 1)}
        entries = {token_id: (value, text)} | {other_id: (other, words) for other_id, other, words in candidates}
        positions.append(
            {
                str(other_id): {"logprob": other, "rank": ranks.get(other_id), "decoded_token": words}
                for other_id, (other, words) in entries.items()
            }
        )
    return positions


def hide_token_texts(body: dict[str, Any]) -> dict[str, Any]:
    """Return a response without the texts of tokens beside log-probabilities, which need the tokenizer."""
    choices = []
    for choice in body.get("choices", ()):
        logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
        if not isinstance(logprobs, dict):
            choices.append(choice)
        elif isinstance(logprobs.get("content"), list):
            choices.append(choice | {"logprobs": {"content": [_hide_text(token) for token in logprobs["content"]]}})
        else:
            choices.append(choice | {"logprobs": {"token_logprobs": logprobs.get("token_logprobs")}})
    hidden = body | {"choices": choices} if choices else body
    prompt = body.get("prompt_logprobs")
    if isinstance(prompt, list):
        hidden = hidden | {"prompt_logprobs": [_hide_decoded(entries) for entries in prompt]}
    return hidden


def _hide_text(token: Any) -> Any:
    if not isinstance(token, dict):
        return token
    top = token.get("top_logprobs") or []
    return {"logprob": token.get("logprob"), "top_logprobs": [_hide_text(other) for other in top]}


def _hide_decoded(entries: Any) -> Any:
    if not isinstance(entries, dict):
        return entries
    return {token_id: {**entry, "decoded_token": None} for token_id, entry in entries.items()}


def _iter_positions(logprobs: TokenLogprobs, texts: TokenTexts) -> Iterator[tuple[Candidate, list[Candidate]]]:
    """Yield each token, and its candidates: itself, then the most likely ones without it."""
    token_ids = logprobs.token_ids.tolist()
    values = _to_numbers(logprobs.logprobs)
    k = len(logprobs.top_token_ids) // max(1, len(token_ids))
    top_values = _to_numbers(logprobs.top_logprobs)
    for position, (token_id, value) in enumerate(zip(token_ids, values, strict=True)):
        before = token_ids[max(0, position - 4) : position]
        own = (token_id, value, escape_surrogates(texts.get(before, token_id)))
        others = zip(_get_top_ids(logprobs, position), top_values[position * k :], strict=False)
        yield (
            own,
            [own]
            + [
                (other_id, other, escape_surrogates(texts.get(before, other_id)))
                for other_id, other in others
                if other_id not in (token_id, -1)
            ],
        )


def _get_top_ids(logprobs: TokenLogprobs, position: int) -> list[int]:
    k = len(logprobs.top_token_ids) // max(1, len(logprobs))
    ids: list[int] = logprobs.top_token_ids[position * k : (position + 1) * k].tolist()
    return ids


def _to_numbers(values: Any) -> list[float]:
    decimals = to_shortest_decimals(values)
    return [_LOWEST if math.isnan(value) else value for value in decimals.tolist()] if decimals is not None else []


def _build_chat_token(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8"))}
