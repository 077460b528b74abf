"""Measure the constants of an `EngineCostModel` on a loaded engine, by timing batches over about a thousand steps."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Protocol

import numpy as np

from dpgen.engine.messages import EngineInfo, Event, RowsFinished
from dpgen.errors import DpgenError
from dpgen.records import Request, RequestId
from dpgen.simulation.simulator import EngineCostModel

logger = logging.getLogger(__name__)

# Generated tokens of two batches that are equal otherwise; the difference of their times is pure decoding.
_FEW_TOKENS, _MORE_TOKENS = 4, 36
_SHORT_PROMPT_TOKENS, _LONG_PROMPT_TOKENS = 32, 1024
_REPEATS = 3
_PLAIN_TOKEN_IDS = range(10, 250)  # exist in any vocabulary


class TimedEngine(Protocol):
    """Interface of a loaded engine, as far as calibration uses it."""

    def submit(self, requests: list[Request]) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]: ...


def calibrate(engine: TimedEngine, info: EngineInfo) -> EngineCostModel:
    """Time batches of several sizes, with short and long prompts, and return the model fitted to them (least squares).

    The engine's own sampling parameters must not limit lengths: `max_tokens` and `ignore_eos` are set here.

    Raises:
        DpgenError: the context or the KV cache is too small, or the engine failed a row.
    """
    num_seqs = info.max_num_seqs
    long_prompt = min(
        _LONG_PROMPT_TOKENS,
        info.max_model_len - _MORE_TOKENS - 1,
        _compute_kv_tokens_per_seq(info) - _MORE_TOKENS,
    )
    if long_prompt <= _SHORT_PROMPT_TOKENS:
        raise DpgenError(
            "the engine's context or KV cache is too small to calibrate with. Run dpgen simulate without --calibrate, "
            "and pass the constants as options"
        )
    # A warm-up: the first steps also compile kernels and fill caches.
    _time_batch_s(engine, num_seqs, _SHORT_PROMPT_TOKENS, _MORE_TOKENS)
    sizes = sorted({1, max(1, num_seqs // 8), max(1, num_seqs // 2), num_seqs})
    samples = [
        _measure_batch(engine, size, num_prompt_tokens)
        for num_prompt_tokens in (_SHORT_PROMPT_TOKENS, long_prompt)
        for size in sizes
    ]
    return _fit_model(samples, info)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Measured times of a batch.

    Attributes:
        size: sequences.
        kv_tokens: tokens in the KV cache, on average over the batch's steps.
        prompt_tokens: over all sequences.
        step_s: seconds per decoding step.
        prefill_s: seconds for all prompts.
    """

    size: int
    kv_tokens: float
    prompt_tokens: int
    step_s: float
    prefill_s: float


def _measure_batch(engine: TimedEngine, size: int, num_prompt_tokens: int) -> _Sample:
    few_s = median(_time_batch_s(engine, size, num_prompt_tokens, _FEW_TOKENS) for _ in range(_REPEATS))
    more_s = median(_time_batch_s(engine, size, num_prompt_tokens, _MORE_TOKENS) for _ in range(_REPEATS))
    step_s = max(0.0, (more_s - few_s) / (_MORE_TOKENS - _FEW_TOKENS))
    prefill_s = max(0.0, few_s - _FEW_TOKENS * step_s)
    logger.info(
        f"calibrating: {size} sequences with prompts of {num_prompt_tokens:,} tokens take {1000 * step_s:.2f} ms per "
        f"step, and {1000 * prefill_s:.1f} ms for the prompts"
    )
    kv_tokens = size * (num_prompt_tokens + (_FEW_TOKENS + _MORE_TOKENS) / 2)
    return _Sample(size, kv_tokens, size * num_prompt_tokens, step_s, prefill_s)


def _fit_model(samples: Sequence[_Sample], info: EngineInfo) -> EngineCostModel:
    size, kv_tokens, prompts, step, prefill = np.array([dataclasses.astuple(sample) for sample in samples]).T
    # Relative errors, so that a small batch's time counts as much as a large one's.
    terms = np.stack([np.ones_like(size), size, kv_tokens], axis=1)
    step_s, seq_s, kv_s = _fit_non_negative(terms / step[:, None], np.ones_like(step))
    return EngineCostModel(
        step_s,
        seq_s,
        kv_s,
        float((prompts * prefill).sum() / (prompts**2).sum()),
        info.max_num_seqs,
        info.num_kv_blocks * info.kv_block_tokens or None,
    )


def _fit_non_negative(terms: np.ndarray, values: np.ndarray) -> list[float]:
    """Return the least-squares factors of the terms; a term whose factor would be negative is left out."""
    used = list(range(terms.shape[1]))
    while True:
        solution, *_ = np.linalg.lstsq(terms[:, used], values, rcond=None)
        if (solution >= 0).all() or len(used) == 1:
            break
        del used[int(solution.argmin())]
    factors = np.zeros(terms.shape[1])
    factors[used] = solution
    return [float(max(0.0, factor)) for factor in factors]


def _compute_kv_tokens_per_seq(info: EngineInfo) -> int:
    """Return the tokens that each of `max_num_seqs` sequences may have in the KV cache."""
    return info.num_kv_blocks * info.kv_block_tokens // info.max_num_seqs or info.max_model_len


def _time_batch_s(engine: TimedEngine, num_rows: int, num_prompt_tokens: int, num_tokens: int) -> float:
    """Return the seconds from submitting rows to an idle engine until it has finished all of them."""
    requests = [
        # Random prompts, so that the prefix cache holds none of them.
        Request(
            RequestId(row),
            random.choices(_PLAIN_TOKEN_IDS, k=num_prompt_tokens),
            None,
            _make_fixed_length_sampling(num_tokens),
        )
        for row in range(num_rows)
    ]
    started_s = time.monotonic()
    engine.submit(requests)
    num_unfinished = num_rows
    while num_unfinished:
        for event in engine.poll(1.0):
            if isinstance(event, RowsFinished):
                _raise_if_failed(event)
                num_unfinished -= len(event.results)
    return time.monotonic() - started_s


def _raise_if_failed(event: RowsFinished) -> None:
    error = next((result.error for result in event.results if result.error is not None), None)
    if error is not None:
        raise DpgenError(f"the engine can't be calibrated, since it failed a row: {error.type}: {error.message}")


def _make_fixed_length_sampling(num_tokens: int) -> dict[str, object]:
    return {"max_tokens": num_tokens, "ignore_eos": True, "n": 1}
