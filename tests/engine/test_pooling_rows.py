"""Sequences of a row become one result: chunks are averaged, documents compared, NaN is an error."""

from __future__ import annotations

import numpy as np
import pytest

from dpgen.engine.pooling_rows import PoolingRow
from dpgen.output.result_columns.pooled_columns import convert_embedding
from dpgen.records import PoolingRequest, Request, RequestId, RowResult


def make_row(num_tokens: int, dtype: str = "float32", **fields: object) -> PoolingRow:
    pooling = PoolingRequest("embed", **fields)  # type: ignore[arg-type]
    return PoolingRow(Request(RequestId(7), [0] * num_tokens, pooling=pooling), num_tokens, dtype)


def finish(row: PoolingRow, *vectors: list[float] | list[list[float]]) -> RowResult:
    results = [row.add(number, np.array(vector, np.float32)) for number, vector in enumerate(vectors)]
    assert not any(results[:-1]), "a row is finished with its last sequence, not before"
    assert results[-1] is not None
    return results[-1]


def test_a_single_sequence_is_the_result() -> None:
    result = finish(make_row(3), [1.0, 2.0])
    assert result.row == 7 and result.num_prompt_tokens == 3 and result.pooled is not None
    assert result.pooled.values.tolist() == [[1.0, 2.0]] and result.pooled.num_chunks == 1


def test_chunks_weigh_as_many_as_they_have_tokens_and_stay_of_length_1() -> None:
    result = finish(make_row(4, lengths=(3, 1), texts=(0, 0)), [1.0, 0.0], [0.0, 1.0])
    assert result.pooled is not None and result.pooled.num_chunks == 2
    assert result.pooled.values[0] == pytest.approx(np.array([3.0, 1.0]) / np.sqrt(10))


def test_chunks_of_other_lengths_are_not_normalized() -> None:
    result = finish(make_row(4, lengths=(3, 1), texts=(0, 0)), [4.0, 0.0], [0.0, 8.0])
    assert result.pooled is not None and result.pooled.values[0].tolist() == [3.0, 2.0]


def test_documents_are_compared_with_the_query() -> None:
    result = finish(make_row(6, lengths=(2, 2, 2), has_query=True), [3.0, 0.0], [2.0, 0.0], [1.0, 1.0])
    assert result.pooled is not None
    assert result.pooled.values[:, 0] == pytest.approx([1.0, np.sqrt(0.5)])


def test_models_that_embed_each_token_sum_the_best_matches() -> None:
    query, document = [[1.0, 0.0], [0.0, 2.0]], [[0.5, 0.0], [3.0, 1.0], [0.0, -1.0]]
    result = finish(make_row(5, lengths=(2, 3), has_query=True), query, document)
    assert result.pooled is not None and result.pooled.values.tolist() == [[5.0]]


def test_each_token_has_its_reward() -> None:
    result = finish(make_row(3, is_per_token=True), [[0.1], [0.2], [0.3]])
    assert result.pooled is not None and result.pooled.values.shape == (3, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_the_rows_error(value: float) -> None:
    result = finish(make_row(1), [0.5, value])
    assert result.error is not None and result.error.type == "not_finite" and result.pooled is None


@pytest.mark.parametrize("value", [-65504.0, 65519.0, -65520.0, 1e6])
def test_a_vector_that_its_column_would_make_infinite_is_the_rows_error(value: float) -> None:
    with np.errstate(over="ignore"):
        is_held = bool(np.isfinite(convert_embedding(np.array([value], np.float32), "float16")).all())
    result = finish(make_row(1, "float16"), [0.5, value])
    assert (result.error is None) == (result.pooled is not None) == is_held
    if result.error is not None:
        assert result.error.type == "not_finite" and "output.embedding_dtype=float32" in result.error.message
    for dtype in ("float32", "int8", "binary"):
        assert finish(make_row(1, dtype), [0.5, value]).error is None
