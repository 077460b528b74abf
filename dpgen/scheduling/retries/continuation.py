"""Continue a sample that ended by `length` from its own tokens: the request for the rest, and the whole of both.

- The rest's prompt is the row's prompt and the tokens so far, so no token is generated twice.
- Where the engine decodes texts (stop strings), the whole text is that of the pieces: a character whose bytes are in
  both is not put together.
- A text that follows a grammar is not continued: vLLM would begin the grammar anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpgen.data.openai_batch.requests import is_constrained
from dpgen.records import Completion, Request, RowResult, UndecodedRow


def list_token_ids(completion: Completion) -> list[int]:
    """Return the generated tokens of a completion; none if it does not hold them."""
    if completion.logprobs is not None:
        ids: list[int] = completion.logprobs.token_ids.tolist()
        return ids
    return completion.token_ids or []


def has_room(request: Request, completion: Completion, max_model_len: int) -> bool:
    """Return True if a sample was cut off by `max_tokens`, and the context has room for more.

    Args:
        request: the row's, with the prompt alone.
    """
    if completion.finish_reason != "length" or request.prompt_token_ids is None:
        return False
    if is_constrained(request):
        return False
    num_tokens = len(list_token_ids(completion))
    return num_tokens > 0 and len(request.prompt_token_ids) + num_tokens < max_model_len


def extend_prompt(request: Request, completion: Completion) -> Request:
    """Return the request for the rest of a sample.

    Args:
        request: asks for the sample again.
    """
    assert request.prompt_token_ids is not None
    token_ids = [*request.prompt_token_ids, *list_token_ids(completion)]
    return replace(request, prompt_token_ids=token_ids, sampling={**request.sampling, "min_tokens": 0})


def join_result(
    before: Completion, result: RowResult | UndecodedRow, prompt_token_ids: Sequence[int]
) -> RowResult | UndecodedRow:
    """Return the result of a whole sample.

    Args:
        before: the sample so far.
        result: of the rest.
        prompt_token_ids: the row's prompt.
    """
    if isinstance(result, UndecodedRow):
        whole = _join(before, result.result)
        [token_ids] = result.token_ids
        ids = ([*list_token_ids(before), *token_ids],)
        return replace(result, result=whole, token_ids=ids, prompt_token_ids=prompt_token_ids)
    return _join(before, result)


def _join(before: Completion, result: RowResult) -> RowResult:
    if not result.completions:
        return result
    [rest] = result.completions
    logprobs = None if before.logprobs is None or rest.logprobs is None else before.logprobs.join(rest.logprobs)
    whole = replace(
        rest,
        text=before.text + rest.text,
        num_tokens=before.num_tokens + rest.num_tokens,
        token_ids=None if rest.token_ids is None else [*list_token_ids(before), *rest.token_ids],
        logprobs=logprobs,
    )
    return replace(result, completions=(whole,))
