"""Hold what a pooling model makes of a row: vectors of numbers, as one flat array.

A row's result has one vector for an embedding, the probabilities of classes, or a reward; one for each document that is
scored; and one for each token where rewards are of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VALUE_TYPE = "<f4"  # of the values on the disk


@dataclass(frozen=True, slots=True, eq=False)
class PooledOutput:
    """Hold a row's vectors.

    Attributes:
        values: float32[num_vectors, width].
        num_chunks: sequences that the row's text was read in; more than 1 with data.too_long=chunk_mean.
        num_cut_tokens: tokens of the row's texts that were not read, with data.too_long=truncate.
    """

    values: np.ndarray
    num_chunks: int = 1
    num_cut_tokens: int = 0

    def __eq__(self, other: object) -> bool:
        """Return True if all bytes are equal."""
        return (
            isinstance(other, PooledOutput)
            and (self.num_chunks, self.num_cut_tokens) == (other.num_chunks, other.num_cut_tokens)
            and self.values.shape == other.values.shape
            and self.values.tobytes() == other.values.tobytes()
        )

    @property
    def is_finite(self) -> bool:
        """Return True if no value is NaN or infinite."""
        return bool(np.isfinite(self.values).all())


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
    mean = np.average(stacked, axis=0, weights=lengths).astype(np.float32)
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
