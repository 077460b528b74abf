"""Decide how many engines a rank runs: by the configuration, by the model's size, then by what the first one measures.

- One engine's thread prepares each step while the device runs the one before. Where that thread takes longer than the
  kernels, the device waits, and another engine fills its gaps. Engines pay until the device is busy all the time.
- A small model is one whose kernels may take less time than the thread. Sizes are those at which they do on an H100:
  8 billion parameters in 16 bits keep it busy 96 % of the time, 1 billion a third of it.
- Processor time alone misleads: CUDA's waits spin, also in the thread that steps (0.7 to 1.0 of a step at 8 billion,
  where the GPU is full). So NVML's busy share of the GPU decides, and the thread's time only rules engines out.

Limits: one measurement, from the first rows. What changes later (longer contexts, other rows) changes no number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpgen.config.checks import find_one_engine_reason
from dpgen.config.schema import Config
from dpgen.engine.messages import EngineStats
from dpgen.formatting import format_count


@dataclass(frozen=True)
class Stretch:
    """Say how long an engine has to run: so many seconds and steps, but no longer than `max_s`."""

    min_s: float
    min_steps: int
    max_s: float

    def lies_between(self, first: EngineStats, last: EngineStats) -> bool:
        """Return True if an engine has run so long from one report to another."""
        seconds, num_steps = last.elapsed_s - first.elapsed_s, last.num_steps - first.num_steps
        return seconds >= self.max_s or (seconds >= self.min_s and num_steps >= self.min_steps)


MAX_ENGINES = 4
# Most bytes of weights with which so many engines may pay.
_SIZE_STEPS = ((3.2e9, 4), (5e9, 3), (10e9, 2))
# Options that say what memory an engine takes, so that several would take a multiple of it.
_ONE_ENGINE_KEYS = ("kv_cache_memory_bytes", "kv_offloading_size", "kv_transfer_config", "cpu_offload_gb")
_OVERHEAD_BYTES = 2 << 30  # of an engine beyond its weights and its KV cache: CUDA's context, graphs, activations
_TOKENS_PER_SEQ = 512  # that a sequence has in the KV cache, prompt included, on average
DEFAULT_NUM_SEQS = 256
_PROCESSOR_BOUND = 0.75  # of a step's time, that the thread which steps is busy
_DEVICE_FULL = 0.85  # busy share from which another engine brings no more
# Where nothing tells how busy the device is: waits for it spin a part of the time, so only a thread that never waits
# shows that the processor is the limit.
_UNKNOWN_DEVICE_ENGINES, _SURELY_PROCESSOR_BOUND = 2, 0.98
_FULL_FRACTION = 0.9  # of the sequences that an engine may run: fewer do not show how it runs when it is full
_KV_FULL = 0.9  # of the KV cache: with fewer sequences than could run, it is what limits them
_MAX_KV_REPORTS = 5  # in a row, with a full KV cache, after which the rest of the memory is used
_SETTLE = Stretch(0.5, 10, 1.0)  # dropped: graphs warm up, and all rows are prefilled
_MEASURE = Stretch(1.0, 30, 3.0)
_DEVICE_WINDOW_S = 1.0  # of the past that one reading of NVML averages over, at most
_PATIENCE_S = 20.0  # for which an engine may be no fuller than it was, until it counts as full as it gets
_GROWTH = 0.05  # of the sequences that an engine may run, by which it is fuller
_DIP_S = 0.6  # for which a full one may have fewer: rows of one length end together, and those after them are prefilled
_FULL_TIMES = 2  # of the rows that an engine runs at a time: so many must be left for another one to pay, at any speed
_UNKNOWN_TIMES = 4  # the same, while nothing tells how fast rows are finished
_PAYS_TIMES = 1.5  # a start-up pays if the work left takes so many times as long


@dataclass(frozen=True)
class EngineCount:
    """Hold how many engines a rank runs, and why.

    Attributes:
        number: of engines; with `is_auto`, at most.
        why: the reason, as the end of a sentence.
        is_auto: True while the number is still to be measured.
        facts: the numbers behind the reason, for run.json.
    """

    number: int
    why: str
    is_auto: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """Return a line for the log."""
        return f"{format_count(self.number, 'engine')} a rank: {self.why}"


def plan_engine_count(
    config: Config, size_bytes: float, num_cores: int, *, on_gpu: bool, num_sharing: int = 1
) -> EngineCount:
    """Return how many engines a rank is to have, or how many at most, before anything is started.

    Args:
        size_bytes: of the weights; 0 where unknown.
        num_cores: of this rank, its own process's included.
        on_gpu: False for engines on the CPU.
        num_sharing: ranks that share the GPU.
    """
    given = config.parallel.engines_per_rank
    if given != "auto":
        return EngineCount(given, f"parallel.engines_per_rank={given}")
    if (obstacle := find_one_engine_reason(config.parallel)) is not None:
        return EngineCount(1, obstacle)
    if config.run.engine == "fake":
        models_processor = bool(config.engine.get("processor_s"))
        return EngineCount(MAX_ENGINES if models_processor else 1, "the fake engine", is_auto=models_processor)
    if not on_gpu:
        return EngineCount(1, "the model runs on the processor itself")
    if num_sharing > 1:
        return EngineCount(1, f"{num_sharing} ranks share its GPU")
    if own := [key for key in _ONE_ENGINE_KEYS if config.engine.get(key) is not None]:
        return EngineCount(1, f"engine.{own[0]} is set, for the memory of one")
    if not size_bytes:
        return EngineCount(1, "the size of the model's weights is not known")
    by_size = next((number for limit, number in _SIZE_STEPS if size_bytes <= limit), 1)
    number = max(1, min(by_size, num_cores - 1, MAX_ENGINES))
    size = f"weights of {size_bytes / 1e9:.1f} GB"
    if number == 1:
        limit = "few cores" if by_size > 1 else "a GPU is busy with them all the time"
        return EngineCount(1, f"{size}, {limit}" + (f" ({num_cores})" if by_size > 1 else ""))
    return EngineCount(number, f"{size}, at most {number}", is_auto=True)


def estimate_engine_bytes(
    size_bytes: float, kv_bytes_per_token: float, options: Mapping[str, Any], max_model_len: int = 0
) -> int:
    """Return the device memory that one engine should have: weights, and a KV cache for its sequences.

    Args:
        options: `engine.*`.
        max_model_len: tokens of the longest sequence, which vLLM wants to have room for; 0 where unknown.
    """
    given = options.get("max_model_len") or 0
    num_tokens = min(_TOKENS_PER_SEQ, given) if given > 0 else _TOKENS_PER_SEQ  # -1: what fits in memory
    num_seqs = options.get("max_num_seqs") or DEFAULT_NUM_SEQS
    return int(size_bytes + _OVERHEAD_BYTES + kv_bytes_per_token * max(num_tokens * num_seqs, max_model_len))


def fit_memory(number: int, engine_bytes: int, usable_bytes: int) -> int:
    """Return how many of `number` engines the memory has room for, at least one."""
    return max(1, min(number, usable_bytes // engine_bytes)) if engine_bytes else number


@dataclass(frozen=True)
class Signals:
    """Hold what a full engine's steps have measured.

    Attributes:
        step_s: of one step.
        processor_s: of the thread that steps, in one step.
        device_busy: share of the time in which the device runs kernels; None where nothing tells.
        num_running: sequences at a time.
        is_kv_full: True if the KV cache, not `max_num_seqs`, limits the sequences.
    """

    step_s: float
    processor_s: float
    device_busy: float | None
    num_running: int
    is_kv_full: bool = False

    @property
    def processor_busy(self) -> float:
        return min(1.0, self.processor_s / self.step_s) if self.step_s else 0.0

    def describe(self) -> str:
        """Return the numbers as a text."""
        gpu = "not known" if self.device_busy is None else f"busy {self.device_busy:.2f} of the time"
        return (
            f"a step of {format_count(self.num_running, 'sequence')} takes {1000 * self.step_s:.1f} ms, of which its "
            f"thread computes {1000 * self.processor_s:.1f} ms; GPU {gpu}"
        )

    def list_facts(self) -> dict[str, Any]:
        """Return the numbers for run.json."""
        return {
            "step_ms": round(1000 * self.step_s, 2),
            "processor_ms": round(1000 * self.processor_s, 2),
            "device_busy": None if self.device_busy is None else round(self.device_busy, 3),
            "num_running": self.num_running,
        }


def decide_engine_count(signals: Signals, max_engines: int) -> EngineCount:
    """Return how many engines pay, by what the first one has measured."""
    numbers, facts = signals.describe(), signals.list_facts()
    if signals.is_kv_full:
        return EngineCount(
            max_engines, f"{numbers}; its KV cache is full, and each further engine has one", facts=facts
        )
    is_known = signals.device_busy is not None
    if signals.processor_busy < (_PROCESSOR_BOUND if is_known else _SURELY_PROCESSOR_BOUND):
        return EngineCount(1, f"{numbers}; the processor is not the limit", facts=facts)
    if signals.device_busy is None:
        return EngineCount(
            min(max_engines, _UNKNOWN_DEVICE_ENGINES), f"{numbers}; the processor is the limit", facts=facts
        )
    number = 1
    while number < max_engines and number * signals.device_busy < _DEVICE_FULL:
        number += 1
    reason = "the GPU is full" if number == 1 else "the processor is the limit"
    return EngineCount(number, f"{numbers}; {reason}", facts=facts)


def fills_another(rows_left: float, rows_at_once: float) -> bool:
    """Return True if the rows that are left fill several engines, at whatever speed; arguments as of `pays`."""
    return rows_left >= _FULL_TIMES * rows_at_once


def pays(rows_left: float, rows_per_s: float, start_s: float, rows_at_once: float) -> bool:
    """Return True if another engine saves more time than it takes to start.

    Args:
        rows_left: that this rank has to generate.
        rows_per_s: at which it generates now; 0 where unknown.
        start_s: that an engine takes to start.
        rows_at_once: that an engine runs at a time: its sequences, by those that a row has at a time.
    """
    if rows_per_s <= 0:
        return rows_left >= _UNKNOWN_TIMES * rows_at_once
    return fills_another(rows_left, rows_at_once) and rows_left / rows_per_s > _PAYS_TIMES * start_s


class Calibration:
    """Measure the first engine's steps while it generates the job's first rows.

    As soon as an engine has been full for some steps, both halves of what was measured are asked how many engines pay.
    If they disagree, the measurement continues until it is as long as it may be.

    An engine fills slowly where its prompts are long, or its media take time. It is waited for while it becomes fuller.
    Where rows then still wait in it, prompts take so long that it never is full, and it is measured as it is.

    Args:
        max_num_seqs: sequences that it runs at a time.
        max_engines: how many there may be.
    """

    def __init__(self, max_num_seqs: int, max_engines: int) -> None:
        self._max_num_seqs, self._max_engines = max_num_seqs, max_engines
        self._stats: list[EngineStats] = []  # of the full engine, since it has been full but for dips
        self._last_elapsed_s = math.inf  # of its last report
        self._most_running, self._grew_s = 0, 0.0

    def add(self, stats: EngineStats, now_s: float) -> Signals | str | None:
        """Take an engine's newest statistics, and return the signals, or why there are none; None to go on."""
        if stats.elapsed_s < self._last_elapsed_s:  # the engine was started, or started again
            self._stats.clear()
            self._most_running, self._grew_s = stats.num_running, now_s
        elif stats.num_running >= self._most_running + _GROWTH * self._max_num_seqs:
            self._most_running, self._grew_s = stats.num_running, now_s
        self._last_elapsed_s = stats.elapsed_s
        has_patience = now_s - self._grew_s < _PATIENCE_S
        is_full = not _has_few(stats, self._max_num_seqs) or _is_kv_full(stats, self._max_num_seqs)
        if not is_full and (has_patience or not stats.num_waiting):
            if not (has_patience and self._stats and stats.elapsed_s - self._stats[-1].elapsed_s < _DIP_S):
                self._stats.clear()
            if has_patience:
                return None
            return f"the rows fill {stats.num_running:,} of the {self._max_num_seqs:,} sequences of one engine"
        self._stats.append(stats)
        settled = [one for one in self._stats if _SETTLE.lies_between(self._stats[0], one)]
        if not settled or not _MEASURE.lies_between(settled[0], stats):
            return None
        middle = len(settled) // 2
        halves = [self._read_signals(half) for half in (settled[: middle + 1], settled[middle:])]
        numbers = {decide_engine_count(half, self._max_engines).number for half in halves if half is not None}
        is_long_enough = stats.elapsed_s - settled[0].elapsed_s >= _MEASURE.max_s
        is_sure = None not in halves and len(numbers) == 1
        return self._read_signals(settled) if is_sure or is_long_enough else None

    def _read_signals(self, reports: list[EngineStats]) -> Signals | None:
        """Return what the steps between the first and the last of some reports say; None if there are none."""
        first, last = reports[0], reports[-1]
        num_steps, full_s = last.num_steps - first.num_steps, self._stats[0].elapsed_s
        if not num_steps:
            return None
        busy = [
            one.device_busy
            for one in reports[1:]
            if one.device_busy is not None and one.elapsed_s - full_s >= _DEVICE_WINDOW_S
        ]
        return Signals(
            (last.elapsed_s - first.elapsed_s) / num_steps,
            (last.processor_s - first.processor_s) / num_steps,
            sum(busy) / len(busy) if busy else None,
            last.num_running,
            _is_kv_full(last, self._max_num_seqs),
        )


class KvWatch:
    """Notice when the KV cache of running engines becomes too small, as sequences get longer.

    Args:
        max_num_seqs: sequences that an engine runs at a time.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs, self._num_reports = max_num_seqs, 0

    def is_short(self, stats: EngineStats) -> bool:
        """Take an engine's statistics, and return True once several in a row have shown a full KV cache."""
        self._num_reports = self._num_reports + 1 if _is_kv_full(stats, self._max_num_seqs) else 0
        if self._num_reports < _MAX_KV_REPORTS:
            return False
        self._num_reports = 0
        return True


def _has_few(stats: EngineStats, max_num_seqs: int) -> bool:
    return stats.num_running < _FULL_FRACTION * max_num_seqs


def _is_kv_full(stats: EngineStats, max_num_seqs: int) -> bool:
    return _has_few(stats, max_num_seqs) and (stats.kv_cache_usage or 0.0) >= _KV_FULL
