"""Hold log-probabilities of tokens as flat arrays: no Python object for each token, and 8 bytes for each candidate.

- A sequence has the same number k of candidates, its most likely tokens, at each of its tokens. Candidates of token t
  are entries t * k to (t + 1) * k of the flat arrays, the most likely one first.
- NaN stands for a token without a log-probability: the first one of a prompt. Its candidates have id -1 and NaN.
- An infinite log-probability, of a token that sampling forbids, becomes ±9999, as in the answers of vLLM's server:
  JSON can't hold infinities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_LARGEST = 9999.0

# Field of TokenLogprobs → type of its values on the disk. The order is that of a journal record.
ARRAY_TYPES = {"token_ids": "<i4", "logprobs": "<f4", "top_token_ids": "<i4", "top_logprobs": "<f4"}


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogprobs:
    """Hold the tokens of one sequence with their log-probabilities.

    Attributes:
        token_ids: int32[num_tokens], the tokens themselves.
        logprobs: float32[num_tokens], their log-probabilities.
        top_token_ids: int32[num_tokens * k], the candidates.
        top_logprobs: float32[num_tokens * k], the candidates' log-probabilities.

    Raises:
        ValueError: the arrays' lengths don't fit together.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_token_ids: np.ndarray
    top_logprobs: np.ndarray

    def __post_init__(self) -> None:
        num_tokens, num_candidates = len(self.token_ids), len(self.top_token_ids)
        if len(self.logprobs) != num_tokens or len(self.top_logprobs) != num_candidates:
            raise ValueError("ids and log-probabilities differ in number")
        if num_candidates % num_tokens if num_tokens else num_candidates:
            raise ValueError(f"{num_candidates} candidates are not the same number for each of {num_tokens} tokens")

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        """Return True if all bytes are equal, so that NaN equals NaN."""
        return isinstance(other, TokenLogprobs) and self.to_bytes() == other.to_bytes()

    @property
    def total(self) -> float:
        """Return the log-probability of the whole sequence; NaN if a token has none.

        The sum is exact before it is rounded, so that it is the same on every machine.
        """
        return math.fsum(self.logprobs.tolist())

    def slice(self, start: int, stop: int) -> TokenLogprobs:
        """Return the tokens at positions start..stop."""
        k = len(self.top_token_ids) // max(1, len(self))
        top = slice(start * k, stop * k)
        return TokenLogprobs(
            self.token_ids[start:stop], self.logprobs[start:stop], self.top_token_ids[top], self.top_logprobs[top]
        )

    def join(self, other: TokenLogprobs) -> TokenLogprobs:
        """Return the tokens of both, this one's first.

        Raises:
            ValueError: they differ in the number of candidates.
        """
        names = ARRAY_TYPES
        return TokenLogprobs(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))

    def to_bytes(self) -> dict[str, bytes]:
        """Return each array as little-endian bytes, by the field's name."""
        return {name: getattr(self, name).astype(dtype, copy=False).tobytes() for name, dtype in ARRAY_TYPES.items()}


def from_rows(token_ids: Sequence[int], rows: Any, values: Any, k: int) -> TokenLogprobs:
    """Return the log-probabilities that vLLM's `FlatLogprobs` holds, or those of a prompt.

    Args:
        token_ids: all tokens of the sequence.
        rows: ids, k + 1 for each token: the token itself, then the candidates. The first tokens may lack theirs.
        values: the log-probabilities of `rows`.

    Raises:
        ValueError: `rows` and `values` are not those of `token_ids`.
    """
    ids: np.ndarray = np.asarray(rows, np.int32).reshape(-1)
    logprobs: np.ndarray = np.asarray(values, np.float32).reshape(-1)
    if len(ids) % (k + 1) or len(ids) != len(logprobs) or len(ids) > len(token_ids) * (k + 1):
        raise ValueError(f"{len(ids)} log-probabilities for {len(token_ids)} tokens, {k + 1} each")
    ids, logprobs = ids.reshape(-1, k + 1), logprobs.reshape(-1, k + 1)
    if not np.isfinite(logprobs).all():
        logprobs = np.nan_to_num(logprobs, nan=np.nan, posinf=_LARGEST, neginf=-_LARGEST)
    if num_without := len(token_ids) - len(ids):
        ids = np.concatenate([np.full((num_without, k + 1), -1, np.int32), ids])
        logprobs = np.concatenate([np.full((num_without, k + 1), np.nan, np.float32), logprobs])
    own_ids = np.asarray(token_ids, np.int32)
    if (ids[num_without:, 0] != own_ids[num_without:]).any():
        raise ValueError("log-probabilities of other tokens")
    return TokenLogprobs(own_ids, logprobs[:, 0].copy(), ids[:, 1:].reshape(-1), logprobs[:, 1:].reshape(-1))
