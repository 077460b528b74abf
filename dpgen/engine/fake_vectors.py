"""Make up the vectors that the fake engine returns for the tasks of pooling models; they depend on the tokens alone."""

from __future__ import annotations

import hashlib

import numpy as np

from dpgen.config.pooling.pooling_config import PoolingConfig
from dpgen.data.prompts.pooling import CROSS_ENCODER
from dpgen.engine.pooling_rows import PoolingRow
from dpgen.records import PooledKind, PoolingRequest, Request, RowResult

LABELS = ("NEGATIVE", "NEUTRAL", "POSITIVE")
_WIDTH = 16


def describe_fake_vectors(config: PoolingConfig) -> PooledKind:
    """Return what the fake engine says of its vectors."""
    if config.task == "embed":
        return PooledKind(min(config.dimensions or _WIDTH, _WIDTH))
    if config.task == "classify":
        return PooledKind(len(LABELS), LABELS)
    return PooledKind(1, score_type=CROSS_ENCODER)


def make_fake_vectors(request: Request, pooling: PoolingRequest) -> RowResult:
    """Return the result of a request."""
    token_ids = request.prompt_token_ids or []
    row = PoolingRow(request, len(token_ids))
    result = None
    for number, tokens in enumerate(pooling.split(token_ids)):
        result = row.add(number, _make_vectors(pooling, tokens))
    assert result is not None
    return result


def _make_vectors(pooling: PoolingRequest, token_ids: list[int]) -> np.ndarray:
    digest = hashlib.blake2b(repr(token_ids).encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(digest, "little"))
    if pooling.task == "embed":
        vector = random.standard_normal(_WIDTH)[: pooling.dimensions]
        length = 1 if pooling.normalize is False else np.linalg.norm(vector)
        return np.asarray(vector / length, np.float32)
    if pooling.task == "classify":
        weights = np.exp(random.standard_normal(len(LABELS)))
        return np.asarray(weights / weights.sum(), np.float32)
    if pooling.is_per_token:
        return np.asarray(random.random((len(token_ids), 1)), np.float32)
    return np.asarray(random.random(1), np.float32)
