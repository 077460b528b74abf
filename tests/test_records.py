"""Journal records: what goes in comes out, byte for byte, and a record that is not whole is none."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpgen.logprobs import TokenLogprobs, from_rows
from dpgen.records import (
    Completion,
    PooledOutput,
    PoolingRequest,
    Request,
    RequestId,
    RowError,
    RowResult,
    ScoredCompletion,
    ServerRequest,
    ToolCall,
    UndecodedRow,
    derive_row_seed,
    derive_seed,
)
from dpgen.result_codec import decode_result, encode_result


@st.composite
def token_logprobs(draw: st.DrawFn) -> TokenLogprobs:
    num_tokens, k = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    ids, floats = st.integers(-1, 2**31 - 1), st.floats(width=32, allow_nan=True)

    def make(values: st.SearchStrategy[Any], count: int, dtype: Any) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=count, max_size=count)), dtype)

    return TokenLogprobs(
        make(ids, num_tokens, np.int32),
        make(floats, num_tokens, np.float32),
        make(ids, num_tokens * k, np.int32),
        make(floats, num_tokens * k, np.float32),
    )


completions = st.builds(
    Completion,
    st.text(),
    st.sampled_from([None, "stop", "length"]),
    st.integers(0, 9),
    st.none() | st.lists(st.integers(0, 9), max_size=3),
    reasoning=st.none() | st.text(),
    tool_calls=st.lists(st.builds(ToolCall, st.text(), st.text(), st.text()), max_size=2).map(tuple),
    parsed=st.none() | st.text(),
    parse_error=st.none() | st.text(),
    logprobs=st.none() | token_logprobs(),
    stop_reason=st.none() | st.text() | st.integers(0, 9),
)
results = st.builds(
    RowResult,
    st.integers(0, 2**40),
    st.none() | st.integers(0, 9),
    st.lists(completions, max_size=3).map(tuple),
    st.none() | st.builds(RowError, st.text(), st.text()),
    st.none() | token_logprobs(),
    st.none() | st.builds(ScoredCompletion, token_logprobs(), st.booleans()),
)


@settings(deadline=None)
@given(results)
def test_a_result_with_log_probabilities_comes_back_from_its_record_as_it_was(result: RowResult) -> None:
    record = encode_result(result)
    decoded = decode_result(record)
    assert decoded == result
    assert encode_result(decoded) == record


@settings(deadline=None, max_examples=50)
@given(results, st.data())
def test_a_record_that_is_cut_short_or_longer_is_rejected(result: RowResult, data: st.DataObject) -> None:
    record = encode_result(result)
    end = data.draw(st.integers(0, len(record) - 1))
    for damaged in (record[:end], record + b"\0"):
        with pytest.raises((ValueError, KeyError, TypeError)):
            decode_result(damaged)


def test_a_record_without_log_probabilities_has_the_bytes_of_older_versions() -> None:
    result = RowResult(7, 3, (Completion("a\nb", "stop", 2, [5, 6]),), RowError("x", "y"))
    line = b'{"row":7,"prompt_tokens":3,"error":["x","y"],"out":[["a\\nb","stop",2,[5,6]]]}'
    assert encode_result(result) == line and decode_result(line) == result


def make_logprobs() -> TokenLogprobs:
    return from_rows([4, 5], [4, 9, 5, 8], [-1, -0.5, -2, -0.25], 1)


@pytest.mark.parametrize(
    "change",
    [
        (b'"<f4"', b'"<f8"'),
        (b'"token_ids"', b'"other_ids"'),
        (b'"token_ids"', b'"top_token_ids"'),
        (b'"<i4",2]', b'"<i4",1]'),
        (b'"<i4",2]', b'"<i4",-1]'),
        (b"[[0,", b"[[1,"),
        (b'"arrays"', b'"arays"'),
    ],
)
def test_arrays_that_do_not_belong_to_the_record_are_rejected(change: tuple[bytes, bytes]) -> None:
    record = encode_result(RowResult(1, 1, (Completion("x", "stop", 2, logprobs=make_logprobs()),)))
    changed = record.replace(*change, 1)
    assert changed != record
    with pytest.raises((ValueError, KeyError, TypeError)):
        decode_result(changed)


def test_a_candidate_takes_eight_bytes_in_the_journal() -> None:
    logprobs = from_rows(range(1000), np.arange(21_000) // 21, np.zeros(21_000), 20)
    record = encode_result(RowResult(1, 1, (Completion("x", "stop", 1000, logprobs=logprobs),)))
    assert len(record) < 8 * 21_000 + 300


def test_vllms_flat_log_probabilities_become_those_of_tokens_and_candidates() -> None:
    logprobs = from_rows([7, 4, 5], [4, 9, 8, 5, 5, 6], [-3, -0.5, -math.inf, -0.25, -0.25, -9], 2)
    assert logprobs.token_ids.tolist() == [7, 4, 5]
    assert repr(logprobs.logprobs.tolist()) == "[nan, -3.0, -0.25]", "the first token of a prompt has none"
    assert logprobs.top_token_ids.tolist() == [-1, -1, 9, 8, 5, 6]
    assert repr(logprobs.top_logprobs.tolist()) == "[nan, nan, -0.5, -9999.0, -0.25, -9.0]"
    assert math.isnan(logprobs.total) and logprobs.slice(1, 3).total == -3.25
    assert logprobs.slice(1, 2).top_token_ids.tolist() == [9, 8]
    assert from_rows([1], [], [], 2).top_token_ids.tolist() == [-1, -1], "a prompt of one token"


@pytest.mark.parametrize("rows", [[4, 9, 6, 5, 5, 6], [4, 9, 8, 5, 5], [1, 1, 1] * 4])
def test_log_probabilities_of_other_tokens_are_rejected(rows: list[int]) -> None:
    with pytest.raises(ValueError):
        from_rows([7, 4, 3], rows, [-1.0] * len(rows), 2)


def test_a_rows_first_request_has_the_seed_that_it_always_had_and_every_other_request_one_of_its_own() -> None:
    assert derive_seed(3, RequestId(7)) == derive_row_seed(3, 7) == 1745772262072714721
    ids = [RequestId(7, call, sample, attempt) for call in (0, 1) for sample in (0, 1) for attempt in (0, 1, 2)]
    seeds = {derive_seed(run_seed, id) for run_seed in (3, 4) for id in [*ids, RequestId(8, attempt=1)]}
    assert len(seeds) == 2 * (len(ids) + 1) and max(seeds) < 2**62


def test_requests_and_results_cross_a_pipe_and_are_copied_as_they_are() -> None:
    pooling = PoolingRequest("embed", (1, 2), dimensions=8)
    done = Completion("a", "stop", 3, [1, 2, 3], tool_calls=(ToolCall("1", "f", "{}"),), stop_reason=7)
    result = RowResult(5, 2, (done,), RowError("check_failed", "why"), attempt=2, num_calls=4)
    vectors = RowResult(6, 2, pooled=PooledOutput(np.arange(6, dtype=np.float32).reshape(2, 3), 2, 1))
    records: list[Any] = [result, vectors, UndecodedRow(result, ([1], [2]), False, (4, 5))]
    records.append(Request(RequestId(7, 1), [1, 2], {"a": 1}, {"n": 2}, "x", 1, ServerRequest("/v1", {}), pooling))
    for record in records:
        for copied in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record), dataclasses.replace(record)):
            assert copied == record and type(copied) is type(record) and repr(copied) == repr(record)
