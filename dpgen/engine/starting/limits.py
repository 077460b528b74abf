"""Limit an engine: how long it may take and how often it may die, and what its next life may use. No process, no clock.

- Sequences are halved at the first two deaths in a row, then memory is lowered by steps.
- Memory that another process holds at a start is often freed within seconds: the first such start is only repeated. The
  next one gets the memory that is free, unless the user has set `engine.gpu_memory_utilization`.

Limits: a lowered limit stays for the rest of the attempt.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from dpgen.config.sections import RunConfig
from dpgen.engine.messages import EngineSpec, OptionsChecked
from dpgen.errors import EXIT_FAILED, EngineError, EngineStuck, FreeMemory
from dpgen.formatting import format_count

# DPGEN_START_RETRY_S is for tests, which would otherwise wait 20 seconds for an engine that never starts.
_START_RETRY_S = float(os.environ.get("DPGEN_START_RETRY_S") or 10.0)
MAX_STARTS = 3  # of an engine that has never loaded the model
_DEFAULT_NUM_SEQS = 256
_DEFAULT_FRACTION = 0.92  # of vLLM 0.26 to 0.33


@dataclass(frozen=True)
class EngineLimits:
    """Limit how long an engine may get nowhere, and how often it may die.

    Attributes:
        timeout_s: seconds without progress, while it has work, after which an engine counts as hung.
        start_timeout_s: seconds without a message while it starts: for the check of its options, and again for loading
            the model.
        max_deaths: deaths in a row, without a finished row between them, after which the engine is abandoned.
        start_retry_s: seconds before a start that failed is tried again.
    """

    timeout_s: float
    start_timeout_s: float
    max_deaths: int
    start_retry_s: float = _START_RETRY_S

    @classmethod
    def from_config(cls, run: RunConfig) -> EngineLimits:
        """Return the limits that the configuration sets."""
        return cls(run.engine_timeout_s, run.engine_start_timeout_s, run.max_engine_deaths)

    def find_reason_to_abandon(
        self, error: EngineError, deaths_in_a_row: int, sickness: str | None, *, has_loaded: bool
    ) -> str | None:
        """Return why an engine that died is not restarted, as the end of a sentence; None if it is.

        Args:
            sickness: how it fails on all rows; None if it does not.
            has_loaded: False for one that has never loaded the model.
        """
        if isinstance(error, EngineStuck):
            return ", since it holds its devices"
        if deaths_in_a_row >= (self.max_deaths if has_loaded else min(self.max_deaths, MAX_STARTS)):
            return f" after {format_count(deaths_in_a_row, 'death')} in a row"
        return f" after {sickness}" if sickness else None


class EngineMemory:
    """Adapt an engine's spec to the memory that it gets.

    Attributes:
        spec: the engine to start.
        kv_bytes: bytes of KV cache that the ranks agreed on, or less; None before the agreement.
        num_seqs: sequences that the engine runs at a time; None before it has checked its options.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.kv_bytes: int | None = None
        self.num_seqs: int | None = None
        self._was_held = False
        self._has_given_fraction = spec.options.get("gpu_memory_utilization") is not None

    def record_options(self, checked: OptionsChecked) -> None:
        """Note what the check of the options has found; the next lives keep their share of the rank's memory."""
        self.num_seqs = checked.max_num_seqs or self.num_seqs
        self.spec = dataclasses.replace(
            self.spec,
            num_engines=checked.num_engines,
            memory_fraction=checked.memory_fraction,
            is_num_engines_auto=False,
        )

    def record_start(self, num_seqs: int) -> None:
        """Note that the engine is loaded."""
        self.num_seqs, self._was_held = num_seqs, False

    def blames_given_cache(self, error: EngineError) -> bool:
        """Return True if the KV cache that the configuration gives has no block: the error then says what to do."""
        is_blamed = error.has_no_room_for_cache and bool(self.spec.options.get("kv_cache_memory_bytes"))
        if is_blamed:
            error.advice, error.exit_status = "set a larger engine.kv_cache_memory_bytes", EXIT_FAILED
        return is_blamed

    def reduce_after(self, error: EngineError, num_deaths: int) -> str:
        """Lower a limit of the next life if this one ran out of memory, or note in the error what the user can do.

        Args:
            num_deaths: deaths in a row, this one included.

        Returns:
            the new limit as " with NAME=VALUE"; "" if nothing is changed.
        """
        if not error.is_out_of_memory:
            return ""
        options = dict(self.spec.options)
        if error.free_memory is None:
            change = self._lower(options, num_deaths, error)
        elif not self._was_held:
            self._was_held, change = True, ""
        else:
            change = self._fit(options, error.free_memory)
        if error.free_memory is not None:
            error.advice = self._find_problem(error.free_memory) or self._advise(error.free_memory)
        self.spec = dataclasses.replace(self.spec, options=options)
        return change

    def _fit(self, options: dict[str, Any], free: FreeMemory) -> str:
        """Let the engine use what is free, where that may be enough."""
        if self._has_given_fraction or not free.is_at_start or self._find_problem(free):
            return ""
        options["gpu_memory_utilization"] = free.fraction * self.spec.num_engines  # which the engines divide
        return f" with gpu_memory_utilization={free.fraction:g}, which is what other processes leave"

    def _find_problem(self, free: FreeMemory) -> str:
        """Return why the engine can't run in what is free, and what would help; "" if it may."""
        if not free.is_at_start:
            return ""
        weights_gib = self.spec.weight_bytes / 2**30
        if free.fraction and weights_gib < free.fraction * free.total_gib:
            return ""
        need = f"and the weights alone take {weights_gib:.1f} GiB" if weights_gib else "which is too little"
        return f"{need}: end what else runs on it, or use another device"

    def _advise(self, free: FreeMemory) -> str:
        """Return what to write in the configuration, whose memory this rank's engines divide; "" if nothing helps."""
        number = self.spec.num_engines
        if number == 1 or not free.advice:
            return free.advice
        if not free.is_at_start:
            num_bytes = number * int(free.free_gib * 2**30)
            return f"set engine.kv_cache_memory_bytes, which {number} engines divide, to less than {num_bytes}"
        return f"set engine.gpu_memory_utilization={number * free.fraction:g} or lower, which {number} engines divide"

    def _lower(self, options: dict[str, Any], num_deaths: int, error: EngineError) -> str:
        num_seqs = options.get("max_num_seqs") or self.num_seqs or _DEFAULT_NUM_SEQS
        if num_deaths <= 2 and num_seqs > 1:
            options["max_num_seqs"] = num_seqs = max(1, num_seqs // 2)
            return f" with max_num_seqs={num_seqs} (engine.max_num_seqs={num_seqs} keeps this for later attempts)"
        if error.has_no_room_for_cache:  # less memory would leave even less for the cache
            return ""
        if self.kv_bytes is not None:
            self.kv_bytes = self.kv_bytes * 8 // 10
            return f" with a KV cache of {self.kv_bytes >> 20:,} MiB"
        if given := options.get("kv_cache_memory_bytes"):
            options["kv_cache_memory_bytes"] = given * 8 // 10
            return f" with kv_cache_memory_bytes={options['kv_cache_memory_bytes']}"
        usual = self.spec.memory_fraction or _DEFAULT_FRACTION / self.spec.num_sharing
        fraction = round(float(options.get("gpu_memory_utilization") or usual) - 0.1, 2)
        if fraction <= 0:
            return ""
        options["gpu_memory_utilization"] = fraction
        return f" with gpu_memory_utilization={fraction / self.spec.num_engines:g}"


def format_delay(delay_s: float) -> str:
    """Return the delay as the end of a sentence; "" for none."""
    return f" in {delay_s:g} s" if delay_s else ""
