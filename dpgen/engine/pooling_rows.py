"""Make results of what a pooling model returns for each sequence of a request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpgen.records import PooledOutput, PoolingRequest, Request, RowError, RowResult

_FLOAT16_OVERFLOW = 65520.0  # from here on numbers round to infinity; those below round to 65504 at most


class PoolingRow:
    """Collect the vectors of a request's sequences, until all are there.

    Args:
        num_prompt_tokens: of all sequences.
        dtype: `output.embedding_dtype`; what it can't hold is the row's error.
    """

    def __init__(self, request: Request, num_prompt_tokens: int, dtype: str = "float32") -> None:
        assert request.pooling is not None
        self._dtype = dtype
        self.id, self._pooling, self._num_prompt_tokens = request.id, request.pooling, num_prompt_tokens
        self._lengths = request.pooling.lengths or (num_prompt_tokens,)
        self._vectors: list[np.ndarray | None] = [None] * request.pooling.num_sequences
        self._num_missing = len(self._vectors)

    @property
    def is_per_token(self) -> bool:
        """Return True if each token has a vector in the result."""
        return self._pooling.is_per_token

    def add(self, sequence: int, vectors: np.ndarray) -> RowResult | None:
        """Add what the model returned for a sequence, and return the request's result once it has all.

        Args:
            sequence: its number.
            vectors: float32[width]; float32[num_tokens, width] of models that return a vector for each token.
        """
        self._num_missing -= self._vectors[sequence] is None
        self._vectors[sequence] = vectors
        if self._num_missing:
            return None
        found = [vector for vector in self._vectors if vector is not None]
        pooled = _combine(self._pooling, found, self._lengths)
        result = RowResult(self.id.row, self._num_prompt_tokens, pooled=pooled).with_id(self.id)
        if (problem := _find_problem(pooled, self._dtype)) is None:
            return result
        error = RowError("not_finite", problem)
        return RowResult(self.id.row, self._num_prompt_tokens, error=error).with_id(self.id)


def _find_problem(pooled: PooledOutput, dtype: str) -> str | None:
    """Return what is wrong with a result: numbers that are none, or become infinite in the type of its column."""
    if not pooled.is_finite:
        return "the model returned NaN or infinity; engine.dtype=float32 may help"
    largest = float(np.abs(pooled.values).max(initial=0.0)) if dtype == "float16" else 0.0
    if largest < _FLOAT16_OVERFLOW:
        return None
    return (
        f"the embedding has a number of size {largest:.6g}, and float16 holds at most 65504: set "
        "output.embedding_dtype=float32, or output.normalize=true"
    )


def _combine(pooling: PoolingRequest, vectors: Sequence[np.ndarray], lengths: Sequence[int]) -> PooledOutput:
    """Return the result of a request, given the vectors of its sequences."""
    if pooling.is_per_token and not pooling.has_query:
        values = np.concatenate(vectors)
        return PooledOutput(values.reshape(len(values), -1), len(vectors), pooling.num_cut_tokens)
    if len(vectors) == 1:  # nearly all rows: a text in one piece
        return PooledOutput(vectors[0][None], 1, pooling.num_cut_tokens)
    by_text: dict[int, list[int]] = {}
    for sequence, text in enumerate(pooling.texts or range(len(vectors))):
        by_text.setdefault(text, []).append(sequence)
    texts = [average_chunks([vectors[i] for i in parts], [lengths[i] for i in parts]) for parts in by_text.values()]
    num_chunks = max(map(len, by_text.values()))
    if pooling.has_query:
        query, *documents = texts
        scores = [compare_embeddings(query, document) for document in documents]
        return PooledOutput(np.array(scores, np.float32)[:, None], num_chunks, pooling.num_cut_tokens)
    return PooledOutput(np.stack(texts), num_chunks, pooling.num_cut_tokens)


def average_chunks(vectors: Sequence[np.ndarray], lengths: Sequence[int]) -> np.ndarray:
    """Return the mean of a text's chunks as vLLM's server computes it, float32[width].

    Each chunk weighs as many as it has tokens. Where all chunks have length 1, so has their mean.

    Args:
        vectors: float32[width] of each chunk.
        lengths: tokens of each chunk.
    """
    if len(vectors) == 1:
        return vectors[0]
    stacked = np.stack(vectors)
    mean: np.ndarray = np.average(stacked, axis=0, weights=lengths).astype(np.float32)
    if np.allclose(np.linalg.norm(stacked, axis=1), 1, rtol=1e-2, atol=1e-5):
        mean /= max(float(np.linalg.norm(mean)), 1e-12)
    return mean


def compare_embeddings(query: np.ndarray, document: np.ndarray) -> float:
    """Return how similar two texts are: their cosine, or of models that embed each token the sum of best matches.

    Args:
        query, document: float32[width], or float32[num_tokens, width].
    """
    query, document = query.astype(np.float32), document.astype(np.float32)
    if query.ndim == 2:
        return float((query @ document.T).max(axis=1).sum())
    lengths = np.linalg.norm(query) * np.linalg.norm(document)
    return float(query @ document / np.maximum(lengths, np.float32(1e-8)))
