"""Say why vLLM rejects a row or an option."""

from __future__ import annotations

import pydantic

from dpgen.data.prompts.token_ids import exceeds_context


def classify_rejection(
    error: Exception, num_prompt_tokens: int, max_model_len: int, default: str = "bad_sampling"
) -> str:
    """Return the error type of a row that vLLM's `add_request` rejected; vLLM itself gives only a message.

    Args:
        default: the type where nothing else tells it.
    """
    if num_prompt_tokens == 0:
        return "empty_prompt"
    if exceeds_context(num_prompt_tokens, max_model_len):
        return "prompt_too_long"
    if "out of vocabulary" in str(error).lower():
        return "out_of_vocabulary"
    return default


def summarize_error(error: Exception) -> str:
    """Return an error of vLLM or pydantic as one line."""
    if isinstance(error, pydantic.ValidationError):
        parts = []
        for problem in error.errors(include_url=False, include_context=False):
            path = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))
            if problem["type"] != "is_instance_of":
                parts.append(f"{path}: {problem['msg']}" if path else str(problem["msg"]))
        if parts:
            return "; ".join(parts)
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and lines[0].endswith(":"):  # a regular expression, its place and the reason follow
        return " ".join(lines)[:300]
    return lines[0] if lines else type(error).__name__
