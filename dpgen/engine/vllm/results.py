"""Turn vLLM's outputs into results.

- Log-probabilities come as vLLM's `FlatLogprobs`, whose lists are the same in vLLM 0.26 to 0.33. They become arrays
  here, without an object for each of them.
- vLLM itself is not imported: its objects are only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpgen.logprobs import TokenLogprobs, from_rows
from dpgen.records import Completion, RequestId, RowError, RowResult, ScoredCompletion, UndecodedRow


class RunningRow(NamedTuple):
    """Hold what a row's result depends on, besides vLLM's output.

    Attributes:
        id: of the request.
        params: the row's `SamplingParams`, as vLLM got them.
        is_decoded_by_rank: True if vLLM makes no text of it.
        num_completion_tokens: as in its request.
        keeps_token_ids: True if the result holds the generated token ids.
        keeps_prompt: True if the result holds the prompt's log-probabilities, where vLLM has computed them.
        keeps_stop_reason: True if the result says which stop string or token ended a sample.
    """

    id: RequestId
    params: Any
    is_decoded_by_rank: bool = False
    num_completion_tokens: int = 0
    keeps_token_ids: bool = False
    keeps_prompt: bool = True
    keeps_stop_reason: bool = False


def read_result(output: Any, running: RunningRow) -> RowResult | UndecodedRow:
    """Return the result of a row that vLLM has finished; an error `engine_refused` if vLLM's output is no result.

    Args:
        output: vLLM's `RequestOutput`.
    """
    result = _read_undecoded(output, running).with_id(running.id)
    if result.error is not None or result.scored is not None or not running.is_decoded_by_rank:
        return result
    # A stop token (these rows have no stop strings) is no part of the text.
    keep_stop = running.params.include_stop_str_in_output
    samples = _sort_samples(output)
    ids = [list(s.token_ids[:-1] if s.finish_reason == "stop" and not keep_stop else s.token_ids) for s in samples]
    return UndecodedRow(result, tuple(ids), running.params.skip_special_tokens)


def _sort_samples(output: Any) -> list[Any]:
    return sorted(output.outputs, key=lambda sample: sample.index)


def _read_undecoded(output: Any, running: RunningRow) -> RowResult:
    """Return the result; where the rank decodes it, without texts."""
    row, prompt_ids = running.id.row, output.prompt_token_ids or []
    num_prompt_tokens = len(prompt_ids) - running.num_completion_tokens
    samples = _sort_samples(output)
    if any(sample.finish_reason in ("error", "abort") for sample in samples):
        error = RowError("engine_refused", "vLLM aborted the row while it ran")
        return RowResult(row, num_prompt_tokens, error=error)
    try:
        prompt = _read_logprobs(prompt_ids, output.prompt_logprobs, running.params.prompt_logprobs)
        kept_prompt = prompt.slice(0, num_prompt_tokens) if prompt is not None and running.keeps_prompt else None
        if running.num_completion_tokens:
            scored = _read_score(prompt, output.prompt_logprobs, num_prompt_tokens)
            return RowResult(row, num_prompt_tokens, prompt_logprobs=kept_prompt, scored=scored)
        completions = tuple(_read_completion(sample, running) for sample in samples)
    except ValueError as mismatch:
        error = RowError("engine_refused", f"vLLM returned wrong log-probabilities: {mismatch}")
        return RowResult(row, num_prompt_tokens, error=error)
    return RowResult(row, num_prompt_tokens, completions, prompt_logprobs=kept_prompt)


def _read_completion(sample: Any, running: RunningRow) -> Completion:
    flat = sample.logprobs
    k = None if flat is None else max(0, len(flat.token_ids) // max(1, len(flat)) - 1)
    logprobs = _read_logprobs(sample.token_ids, flat, k)
    token_ids = list(sample.token_ids) if running.keeps_token_ids and logprobs is None else None
    return Completion(
        sample.text,
        sample.finish_reason,
        len(sample.token_ids),
        token_ids,
        logprobs=logprobs,
        stop_reason=sample.stop_reason if running.keeps_stop_reason else None,
    )


def _read_score(prompt: TokenLogprobs | None, flat: Any, num_prompt_tokens: int) -> ScoredCompletion:
    """Return the score of a given completion, which vLLM has taken for the end of the prompt.

    Args:
        prompt: the prompt's log-probabilities, with those of the completion.
    """
    if prompt is None or num_prompt_tokens < 1:
        raise ValueError("none at all")
    # vLLM gives the first entry of each token, which is the token itself, its rank: 1 for the most likely token, more
    # where another one is as likely. The first token of all has no entry.
    ranks = flat.ranks
    own_ranks = [ranks[start] for start in flat.start_indices[num_prompt_tokens:]]
    return ScoredCompletion(prompt.slice(num_prompt_tokens, len(prompt)), all(rank == 1 for rank in own_ranks))


def _read_logprobs(token_ids: Sequence[int], flat: Any, k: int | None) -> TokenLogprobs | None:
    """Return the contents of vLLM's `FlatLogprobs` for some tokens; None where none were asked for.

    Raises:
        ValueError: they are not those of these tokens.
    """
    return None if k is None or flat is None else from_rows(token_ids, flat.token_ids, flat.logprobs, k)


def format_id(id: RequestId) -> str:
    """Return a request's id as vLLM takes it: the row's index alone for its first request."""
    return str(id.row) if id == RequestId(id.row) else "-".join(map(str, id))
