"""Measure the engines of one rank during a trial: the part of `dpgen tune` that runs in a rank process.

- Rank 0 decides, from totals of all ranks, how many sequences each engine runs and when the trial ends. The other ranks
  read the number in the store, about once a second, and end when rank 0 does.
- What rank 0 has measured is in RUN_DIR/tuning before the trial ends, so that nothing is lost if it is killed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from dpgen.distributed.group import RankGroup
from dpgen.engine.messages import Event
from dpgen.journal.files import atomic_write_text
from dpgen.records import Request
from dpgen.scheduling.generation_loop import LoopConfig
from dpgen.scheduling.interfaces import Engine
from dpgen.scheduling.progress.throughput import UNKNOWN_RATE
from dpgen.scheduling.progress.totals import Totals
from dpgen.tuning.climb import Climb, choose_start_limit
from dpgen.tuning.meter import RATE_WINDOW_S, Sample
from dpgen.tuning.trial import TrialPlan, TrialResult, get_trial_path

logger = logging.getLogger(__name__)

_LIMIT = "dpgen/tuning"  # store key: below it, for each trial, the sequences that each engine runs now


class LimitedEngine:
    """Pass everything to an engine, but run fewer sequences.

    Args:
        choose_limit: returns the limit until there is another, given what each engine process can run.

    Attributes:
        limit: of each engine process; None for that of `choose_limit`.
    """

    def __init__(self, engine: Engine, choose_limit: Callable[[int], int]) -> None:
        self._engine, self._choose_limit = engine, choose_limit
        self.limit: int | None = None

    @property
    def num_engines(self) -> int:
        """Return the engine processes that are ready; one where the engine does not tell."""
        number: int = getattr(self._engine, "num_ready", 1)
        return max(1, number)

    @property
    def num_caches(self) -> int:
        """Return the engine processes with a KV cache, as `EnginePool.num_caches`."""
        number: int = getattr(self._engine, "num_caches", 1)
        return number

    @property
    def has_all_engines(self) -> bool:
        """Return True unless further engine processes are about to join."""
        return bool(getattr(self._engine, "has_joined_all", True))

    @property
    def largest(self) -> int:
        """Return the sequences that each engine process can run."""
        return self._engine.max_num_seqs // self.num_engines

    @property
    def max_num_seqs(self) -> int:
        # While `engines_per_rank: auto` measures how many pay, the first engine has to be full.
        is_counting = self.limit is None and getattr(self._engine, "is_counting", False)
        if is_counting or not self._engine.max_num_seqs:
            return self._engine.max_num_seqs
        limit = self._choose_limit(self.largest) if self.limit is None else self.limit
        return min(self._engine.max_num_seqs, limit * self.num_engines)

    @property
    def is_abandoned(self) -> bool:
        return self._engine.is_abandoned

    def submit(self, requests: list[Request]) -> None:
        self._engine.submit(requests)

    def poll(self, timeout_s: float) -> list[Event]:
        return self._engine.poll(timeout_s)


class TrialProbe:
    """Measure one trial.

    Args:
        rank: of this process.
        clock, wall_clock: in seconds.
        max_tokens: as of `Climb`.

    Attributes:
        stop_reason: why the trial is over; None while it goes on.
    """

    def __init__(
        self,
        plan: TrialPlan,
        rank: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        max_tokens: float = 0.0,
    ) -> None:
        self._plan, self._rank, self._max_tokens = plan, rank, max_tokens
        self._clock, self._wall_clock = clock, wall_clock
        self.stop_reason: str | None = None
        self._climb: Climb | None = None
        self._num_remaining = 0
        self._start_s = self._begin_s = 0.0

    def adapt(
        self, engine: Engine, group: RankGroup, config: LoopConfig, stop_reason: Callable[[], str | None]
    ) -> tuple[Engine, LoopConfig, Callable[[], str | None]]:
        """Return what the loop is to use in a trial in place of its engine, its settings and its reason to stop."""
        self._engine = LimitedEngine(engine, lambda largest: choose_start_limit(self._plan, largest))
        self._group = group
        # No row waits in the engine, which would run it.
        config = dataclasses.replace(config, reserve_rows=0, rate_window_s=RATE_WINDOW_S)
        return self._engine, config, lambda: stop_reason() or self.stop_reason

    def begin(self, num_remaining: int) -> None:
        """Start the clock of the first rows."""
        self._num_remaining, self._begin_s = num_remaining, self._clock()
        self._start_s = self._wall_clock() - self._plan.started_s

    def update(self, totals: Totals) -> None:
        """Take the totals of all ranks, and decide, or follow rank 0."""
        if self._rank > 0:
            limit = self._group.checked_store.add(self._limit_key, 0)
            self._engine.limit = limit or None
            return
        if self._climb is None:
            if not self._engine.has_all_engines and not totals.num_ranks_without_engine:
                return
            self._climb = self._make_climb()
            self._set_limit(self._climb.limit)
        climb = self._climb
        num_stages = len(climb.stages)
        if totals.num_ranks_without_engine and climb.reason is None:
            climb.fail(self._describe_loss(totals))
        climb.update(self._make_sample(totals))
        if climb.limit != self._engine.limit:
            self._set_limit(climb.limit)
        if len(climb.stages) > num_stages or climb.reason is not None:
            self._write(climb, totals)
        if climb.reason is not None and not climb.has_no_rows:  # the last rows are generated rather than dropped
            self.stop_reason = f"{self._plan.end}: {climb.reason}"

    def _make_climb(self) -> Climb:
        # The start-up counts: the trial began before this process's clock did.
        began_s = self._begin_s - self._start_s
        num_engines = self._engine.num_engines * self._group.size
        largest, rows = max(1, self._engine.largest), self._num_remaining
        return Climb(self._plan, largest, num_engines, rows, began_s, self._max_tokens)

    def _describe_loss(self, totals: Totals) -> str:
        """Return which ranks have no engine, as far as their rates tell: the others' rates are not the job's."""
        lost = [str(rank) for rank, rate in enumerate(totals.rates) if rate == UNKNOWN_RATE]
        which = f"rank {', '.join(lost)}" if len(lost) == totals.num_ranks_without_engine else "a rank"
        return f"{which} has no engine any more: it died too often, see {self._logs}"

    def _make_sample(self, totals: Totals) -> Sample:
        rates = totals.rates
        return Sample(
            self._clock(),
            None if UNKNOWN_RATE in rates else float(sum(rates)),
            totals.num_rows,
            totals.num_generated_tokens,
            totals.num_preemptions,
            totals.num_running_seqs,
            totals.num_running_rows,
            is_running_out=totals.num_unclaimed == 0,
        )

    def _set_limit(self, limit: int) -> None:
        before, self._engine.limit = self._engine.limit or 0, limit
        if self._group.size > 1:
            self._group.checked_store.add(self._limit_key, limit - before)

    @property
    def _logs(self) -> Path:
        """Return RUN_DIR/logs, where each engine has its log."""
        return Path(self._plan.folder).parent / "logs"

    @property
    def _limit_key(self) -> str:
        return f"{_LIMIT}/{self._plan.number}/{self._group.num_shrinks}"

    def _write(self, climb: Climb, totals: Totals) -> None:
        result = TrialResult(
            number=self._plan.number,
            overrides=dict(self._plan.overrides),
            stages=tuple(climb.stages),
            start_s=round(self._start_s, 2),
            wall_s=round(self._wall_clock() - self._plan.started_s, 2),
            num_rows=totals.num_rows,
            num_remaining=self._num_remaining,
            engine_max_num_seqs=self._engine.largest,
            num_ranks=self._group.size,
            num_engines=self._engine.num_engines * self._group.size,
            num_prompt_tokens=totals.num_prompt_tokens,
            num_cached_tokens=totals.num_cached_tokens,
            num_tokens=totals.num_generated_tokens,
            num_finished=totals.num_rows,
            tokens_per_row=climb.tokens_per_row,
            seqs_per_row=climb.seqs_per_row,
            error=climb.error,
            reason=climb.reason or "",
        )
        folder = Path(self._plan.folder)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(get_trial_path(folder, self._plan.number), json.dumps(result.to_json(), indent=1) + "\n")
