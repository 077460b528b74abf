"""How fast an engine is, from a short run: the constants of `dpgen.simulation.simulator.EngineModel`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import numpy as np

from dpgen.engine.messages import EngineInfo, Event, RowsFinished
from dpgen.errors import DpgenError
from dpgen.records import Request
from dpgen.simulation.simulator import EngineCostModel

_FEW_TOKENS, _MORE_TOKENS = 4, 36  # generated in two otherwise equal batches; their difference is pure decoding
_SHORT_PROMPT, _LONG_PROMPT = 32, 1024
_REPEATS = 3
_PLAIN_TOKEN_IDS = range(10, 250)  # any vocabulary has them


class TimedEngine(Protocol):
    """What calibrating needs of a loaded engine."""

    def submit(self, requests: list[Request]) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]: ...


def calibrate(engine: TimedEngine, info: EngineInfo, say: Callable[[str], None]) -> EngineCostModel:
    """Times batches of several sizes, with short and long prompts, and fits the model to them (least squares).

    Takes some hundred steps of the engine. `sampling` must leave the rows their lengths: `max_tokens` and `ignore_eos`
    are this function's.
    """
    sizes = sorted({1, max(1, info.max_num_seqs // 8), max(1, info.max_num_seqs // 2), info.max_num_seqs})
    longest = min(_LONG_PROMPT, info.max_model_len - _MORE_TOKENS - 1, _compute_kv_tokens_per_seq(info) - _MORE_TOKENS)
    if longest <= _SHORT_PROMPT:
        raise DpgenError(
            "the engine's context or KV cache is too small to calibrate with; simulate with given constants"
        )
    _time_batch_s(
        engine, info.max_num_seqs, _SHORT_PROMPT, _MORE_TOKENS
    )  # the first steps also compile, and fill caches
    samples = []
    for prompt in (_SHORT_PROMPT, longest):
        for size in sizes:
            few_s = median(_time_batch_s(engine, size, prompt, _FEW_TOKENS) for _ in range(_REPEATS))
            more_s = median(_time_batch_s(engine, size, prompt, _MORE_TOKENS) for _ in range(_REPEATS))
            step_s = max(0.0, (more_s - few_s) / (_MORE_TOKENS - _FEW_TOKENS))
            prefill_s = max(0.0, few_s - _FEW_TOKENS * step_s)
            say(
                f"{size} sequences, prompts of {prompt} tokens: {1000 * step_s:.2f} ms a step, "
                f"{1000 * prefill_s:.1f} ms for the prompts"
            )
            samples.append((size, size * (prompt + (_FEW_TOKENS + _MORE_TOKENS) / 2), size * prompt, step_s, prefill_s))
    size, kv, prompts, step, prefill = np.array(samples).T
    # Relative errors: a small batch's time counts as much as a large one's.
    terms = np.stack([np.ones_like(size), size, kv], axis=1)
    step_s, seq_s, kv_s = _fit(terms / step[:, None], np.ones_like(step))
    return EngineCostModel(
        step_s,
        seq_s,
        kv_s,
        float((prompts * prefill).sum() / (prompts**2).sum()),
        info.max_num_seqs,
        info.num_kv_blocks * info.kv_block_tokens or None,
    )


def _compute_kv_tokens_per_seq(info: EngineInfo) -> int:
    """Tokens that each of `max_num_seqs` sequences may have in the KV cache."""
    return info.num_kv_blocks * info.kv_block_tokens // info.max_num_seqs or info.max_model_len


def _fit(terms: np.ndarray, values: np.ndarray) -> list[float]:
    """Least squares in which no factor is negative: one that would be is left out."""
    used = list(range(terms.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(terms[:, used], values, rcond=None)
        if (found >= 0).all() or len(used) == 1:
            break
        del used[int(found.argmin())]
    factors = np.zeros(terms.shape[1])
    factors[used] = found
    return [float(max(0.0, each)) for each in factors]


def _time_batch_s(engine: TimedEngine, num_rows: int, num_prompt_tokens: int, num_tokens: int) -> float:
    """Seconds from giving rows to an idle engine until it has finished them all."""
    requests = [
        # Prompts of their own: none is to be found in the prefix cache.
        Request(
            row, random.choices(_PLAIN_TOKEN_IDS, k=num_prompt_tokens), None, _make_fixed_length_sampling(num_tokens)
        )
        for row in range(num_rows)
    ]
    started_s = time.monotonic()
    engine.submit(requests)
    num_left = num_rows
    while num_left:
        for event in engine.poll(1.0):
            if isinstance(event, RowsFinished):
                failed = next((each.error for each in event.results if each.error is not None), None)
                if failed is not None:
                    raise DpgenError(f"the engine can't be calibrated: {failed.type}: {failed.message}")
                num_left -= len(event.results)
    return time.monotonic() - started_s


def _make_fixed_length_sampling(num_tokens: int) -> dict[str, object]:
    return {"max_tokens": num_tokens, "ignore_eos": True, "n": 1}
