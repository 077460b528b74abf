"""Take prompts that are token ids from a column."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from dpgen.errors import RowRefused
from dpgen.formatting import describe_type


def validate_token_ids(column: str, value: Any, num_ids: int | None) -> list[int]:
    """Return a row's token ids, at least one.

    Args:
        num_ids: ids of the vocabulary, counted from 0; None where only the engine knows them.

    Raises:
        RowRefused: `wrong_type`, `empty_prompt`, `out_of_vocabulary`.
    """
    if not isinstance(value, list | tuple):
        raise RowRefused("wrong_type", f"{column} is {describe_type(value)}, not a list of token ids")
    if not value:
        raise RowRefused("empty_prompt", f"{column} has no token ids")
    if any(type(item) is not int for item in value):
        index = next(index for index, item in enumerate(value) if type(item) is not int)
        raise RowRefused("wrong_type", f"{column}: item {index} is {describe_type(value[index])}, not a whole number")
    if min(value) < 0:
        raise RowRefused("out_of_vocabulary", f"{column} has the token id {min(value)}, which is negative")
    if num_ids is not None:
        reject_unknown_ids(value, num_ids)
    return list(value)


def reject_unknown_ids(token_ids: Sequence[int], num_ids: int) -> None:
    """Check that the vocabulary has each token id.

    Args:
        token_ids: at least one.
        num_ids: ids of the vocabulary, counted from 0.

    Raises:
        RowRefused: `out_of_vocabulary`.
    """
    if max(token_ids) >= num_ids:
        raise RowRefused(
            "out_of_vocabulary", f"the prompt has the token id {max(token_ids)}; the vocabulary ends at {num_ids - 1}"
        )


def exceeds_context(num_prompt_tokens: int, max_model_len: int) -> bool:
    """Return True if a prompt leaves no room for a generated token."""
    return num_prompt_tokens >= max_model_len


def reject_too_long(num_prompt_tokens: int, max_model_len: int) -> None:
    """Raise RowRefused (`prompt_too_long`) if a prompt leaves no room for a generated token."""
    if exceeds_context(num_prompt_tokens, max_model_len):
        raise RowRefused("prompt_too_long", f"the prompt has {num_prompt_tokens} tokens, max_model_len={max_model_len}")


def count_token_ids(tokenizer: Any) -> int:
    """Return the highest token id of a tokenizer plus one, which is its length unless ids are left out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def to_text(token_ids: Sequence[int]) -> str:
    """Return a text to compare and measure prompts by: four characters stand for a token, about as in a text."""
    try:
        return array("I", token_ids).tobytes().decode("latin-1")
    except OverflowError:  # the engine rejects the row
        return repr(token_ids)
