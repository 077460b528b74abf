"""Results from vLLM's outputs, with stand-ins for vLLM's objects; test_logprobs_vllm.py has the real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dpgen.engine.vllm.results import RunningRow, read_result
from dpgen.records import RequestId, RowResult, UndecodedRow


def make_flat(rows: list[list[tuple[int, float]] | None], first_ranks: list[int] | None = None) -> Any:
    """Return what vLLM's `FlatLogprobs` holds after these tokens: the token itself, then its candidates."""
    flat = SimpleNamespace(start_indices=[], end_indices=[], token_ids=[], logprobs=[], ranks=[])
    for index, row in enumerate(rows):
        flat.start_indices.append(len(flat.token_ids))
        for rank, (token_id, logprob) in enumerate(row or []):
            flat.token_ids.append(token_id)
            flat.logprobs.append(logprob)
            flat.ranks.append(rank or (first_ranks or [1] * len(rows))[index])
        flat.end_indices.append(len(flat.token_ids))
    return type("Flat", (SimpleNamespace,), {"__len__": lambda self: len(self.start_indices)})(**vars(flat))


def make_output(token_ids: list[int], logprobs: Any = None, prompt_logprobs: Any = None, reason: str = "stop") -> Any:
    sample = SimpleNamespace(index=0, text="", finish_reason=reason, token_ids=token_ids, logprobs=logprobs)
    return SimpleNamespace(
        request_id="7", prompt_token_ids=[10, 11, 12], prompt_logprobs=prompt_logprobs, outputs=[sample]
    )


def make_running(prompt_logprobs: int | None = None, **others: Any) -> RunningRow:
    params = SimpleNamespace(
        prompt_logprobs=prompt_logprobs, skip_special_tokens=True, include_stop_str_in_output=False
    )
    return RunningRow(RequestId(7), params, **others)


PROMPT = make_flat([None, [(11, -1.0)], [(12, -2.0)]], [0, 1, 3])


def test_a_row_that_its_rank_decodes_keeps_its_log_probabilities() -> None:
    flat = make_flat([[(1, -0.5), (1, -0.5), (4, -3.0)], [(2, -2.0), (5, -0.1), (2, -2.0)]])
    undecoded = read_result(make_output([1, 2], flat, PROMPT), make_running(0, is_decoded_by_rank=True))
    assert isinstance(undecoded, UndecodedRow)
    assert undecoded.token_ids == ([1],), "the stop token is no part of the text"
    [completion] = undecoded.result.completions
    assert completion.logprobs is not None and completion.token_ids is None
    assert completion.logprobs.token_ids.tolist() == [1, 2]
    assert completion.logprobs.logprobs.tolist() == [-0.5, -2.0]
    assert completion.logprobs.top_token_ids.tolist() == [1, 4, 5, 2]
    prompt = undecoded.result.prompt_logprobs
    assert prompt is not None and prompt.token_ids.tolist() == [10, 11, 12]
    assert prompt.logprobs[1:].tolist() == [-1.0, -2.0] and len(prompt.top_token_ids) == 0


@pytest.mark.parametrize(("num_completion_tokens", "is_greedy"), [(1, False), (2, False)])
@pytest.mark.parametrize("keeps_prompt", [False, True])
def test_a_given_completion_is_cut_from_the_end_of_the_prompt(
    num_completion_tokens: int, is_greedy: bool, keeps_prompt: bool
) -> None:
    running = make_running(0, num_completion_tokens=num_completion_tokens, keeps_prompt=keeps_prompt)
    result = read_result(make_output([99], None, PROMPT), running)
    assert isinstance(result, RowResult) and result.scored is not None
    assert result.completions == () and result.num_prompt_tokens == 3 - num_completion_tokens
    assert result.scored.logprobs.logprobs.tolist() == [-1.0, -2.0][-num_completion_tokens:]
    assert result.scored.is_greedy is is_greedy, "the last token has rank 3"
    assert (result.prompt_logprobs is not None) is keeps_prompt


def test_a_completion_of_the_most_likely_tokens_is_greedy() -> None:
    flat = make_flat([None, [(11, -1.0)], [(12, -2.0)]], [0, 1, 1])
    result = read_result(make_output([99], None, flat), make_running(0, num_completion_tokens=2))
    assert isinstance(result, RowResult) and result.scored is not None and result.scored.is_greedy


@pytest.mark.parametrize(
    "output",
    [
        make_output([1, 2], make_flat([[(1, -0.5)], [(3, -0.5)]])),
        make_output([1, 2], make_flat([[(1, -0.5)] * 2, [(2, -0.5)]])),
        make_output([1], None, make_flat([None, [(11, -1.0)], [(12, -2.0)], [(11, -1.0)], [(12, -2.0)]])),
    ],
)
def test_log_probabilities_of_other_tokens_become_an_error_and_no_result(output: Any) -> None:
    result = read_result(output, make_running(0))
    assert isinstance(result, RowResult) and result.error is not None
    assert result.error.type == "engine_refused" and "wrong log-probabilities" in result.error.message


def test_a_row_without_log_probabilities_has_its_token_ids_where_they_are_kept() -> None:
    for keeps_token_ids in (True, False):
        result = read_result(make_output([1, 2]), make_running(keeps_token_ids=keeps_token_ids))
        assert isinstance(result, RowResult)
        assert result.completions[0].token_ids == ([1, 2] if keeps_token_ids else None)
    aborted = read_result(make_output([1], reason="abort"), make_running())
    assert isinstance(aborted, RowResult) and aborted.error is not None
