"""Run the engines of one rank as one: one admission, one shard, one journal; see `parallel.engines_per_rank`.

- The first engine loads as a rank's only engine does, and generates. Others join it in the background. Whether they
  join or start again, one loads after the other: vLLM measures memory then, and two would count each other's.
- All have the KV cache that the ranks agreed on with their first engines, so that no further agreement is needed.
- Each engine dies, is restarted and is abandoned alone, with its own blame. What cannot have killed it goes to the
  others at once; rows that may have stay with it. The rank is without an engine only once all are abandoned.
- Statistics are sums. `poll` waits for all engines at once.

Limits: engines that share their work with other ranks are one a rank.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

from dpgen.engine.handle import StartEngine
from dpgen.engine.messages import (
    EngineInfo,
    EngineSpec,
    EngineStats,
    EngineTextConfig,
    Event,
    RowsFinished,
)
from dpgen.engine.pool.engine_count import EngineCount
from dpgen.engine.pool.growth import TOO_FEW_ROWS, EngineGrowth
from dpgen.engine.pool.router import RequestRouter, count_samples
from dpgen.engine.pool.stats_sum import StatsSum
from dpgen.engine.process import wait_for_any
from dpgen.engine.starting.limits import EngineLimits
from dpgen.engine.supervisor import EngineSupervisor
from dpgen.errors import EngineError, EngineHung
from dpgen.formatting import format_count, format_duration
from dpgen.journal.engine_notes import BlameState
from dpgen.records import Request

logger = logging.getLogger(__name__)


class EnginePool:
    """Run one rank's engines.

    Args:
        start: starts a process from a spec, for an engine of a number.
        spec: of each engine; its number of engines is the most that there may be.
        limits: of each engine.
        count: how many there are to be.
        can_restart: as of `EngineSupervisor`.
        clock: seconds that only increase.

    Attributes:
        growth: how many engines there are to be, and why.
        supervisors: the engines, by their numbers.
        has_joined_all: True once all engines that there are to be have loaded the model.
        start_s: seconds that an engine took to start in an earlier job; 0 if none has.
    """

    def __init__(
        self,
        start: StartEngine,
        spec: EngineSpec,
        limits: EngineLimits,
        count: EngineCount,
        *,
        can_restart: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start, self._limits, self._can_restart, self._clock = start, limits, can_restart, clock
        self.start_s = 0.0
        self.supervisors: list[EngineSupervisor] = []
        self._router = RequestRouter(count_samples(spec))
        self.growth = EngineGrowth(count, spec, self._router, clock)
        self._stats = StatsSum()
        self._text_config = EngineTextConfig()
        self._blame: tuple[BlameState, Callable[[], Request | None]] | None = None
        self.has_joined_all = False
        self._load_begin_s: float | None = None
        self._blocked_s: float | None = None  # since when all wait for one that has never been ready
        self._add_engine(spec)

    # ---- start-up: of the first engine alone

    def begin_loading(self) -> None:
        """Let the first engine load its model; see `EngineSupervisor.begin_loading`."""
        if self._load_begin_s is None:
            self._load_begin_s = self._clock()
        self.supervisors[0].begin_loading()

    def check_options(self, on_wait: Callable[[], None]) -> tuple[str, ...]:
        """Wait for the first engine's check of its options; see `EngineSupervisor.check_options`."""
        notes = self.supervisors[0].check_options(on_wait)
        self.growth.limit(self.supervisors[0].memory.spec.num_engines)
        return notes

    def load_model(
        self,
        agree_kv: Callable[[int], int],
        on_wait: Callable[[], None],
        text_config: EngineTextConfig = EngineTextConfig(),  # noqa: B008 - frozen
    ) -> EngineInfo:
        """Load the first engine's model; see `EngineSupervisor.load_model`. Others join once `poll` is called.

        Their processes start now, so that vLLM is imported there meanwhile.
        """
        self._text_config = text_config
        self.begin_loading()
        self.check_options(on_wait)
        self._prepare()
        info = self.supervisors[0].load_model(agree_kv, on_wait, text_config)
        own_s = sum(seconds for _, seconds in self.start_phases)  # of an engine that loaded before this job
        start_s = max(self.start_s, own_s, self._clock() - (self._load_begin_s or 0.0))
        self.growth.begin_measuring(info.max_num_seqs, start_s)
        return info

    def recall(self, state: BlameState, find_canary: Callable[[], Request | None]) -> None:
        """Continue from what an earlier attempt knows of rows; see `BlameTracker.recall` and its `find_canary`."""
        if self._blame is None:  # after a loss of ranks, the engines know more than the earlier attempt
            self._blame = state, find_canary
            for engine in self.supervisors:
                self._teach(engine)

    # ---- what the loop sees

    @property
    def max_num_seqs(self) -> int:
        """Sequences that the engines run at a time; of one that starts again, those that stay with it."""
        ready = sum(engine.max_num_seqs for engine in self.supervisors if engine.is_ready)
        if not ready:
            return sum(engine.max_num_seqs for engine in self.supervisors)
        waiting = (index for index, engine in enumerate(self.supervisors) if not engine.is_ready)
        return ready + sum(min(self.supervisors[index].max_num_seqs, self._router.count(index)) for index in waiting)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together; 0 before a model is loaded."""
        return max(engine.max_model_len for engine in self.supervisors)

    @property
    def is_ready(self) -> bool:
        """True while an engine has loaded its model."""
        return any(engine.is_ready for engine in self.supervisors)

    @property
    def is_abandoned(self) -> bool:
        """True once every engine is abandoned; other ranks then claim this rank's rows."""
        return all(engine.is_abandoned for engine in self.supervisors)

    @property
    def num_deaths(self) -> int:
        """Deaths of all engines."""
        return sum(engine.num_deaths for engine in self.supervisors)

    @property
    def num_ready(self) -> int:
        """Engines that have loaded their model."""
        return sum(engine.is_ready for engine in self.supervisors)

    @property
    def num_caches(self) -> int:
        """Engines with a KV cache; one that starts again has its part for the rows that stay with it."""
        return sum(engine.is_ready or self._router.count(index) > 0 for index, engine in enumerate(self.supervisors))

    @property
    def is_counting(self) -> bool:
        """True while the first engine is measured, or is to be, which tells how many pay."""
        return self.growth.count.is_auto

    @property
    def start_phases(self) -> tuple[tuple[str, float], ...]:
        """What the first engine did until it was ready."""
        return self.supervisors[0].start_phases

    @property
    def final_death(self) -> EngineError | None:
        """How the only engine died, if it can't be restarted."""
        return self.supervisors[0].final_death

    def save_blame(self) -> BlameState:
        """Return what the next attempt needs to know, of an engine that shares its work with other ranks."""
        return self.supervisors[0].blame.save()

    def submit(self, requests: list[Request]) -> None:
        """Give rows to the engines, now or as soon as they can take them."""
        sizes = {index: engine.max_num_seqs for index, engine in enumerate(self.supervisors) if engine.is_ready}
        if not sizes:  # all of them start again
            sizes = {index: engine.max_num_seqs for index, engine in enumerate(self.supervisors) if engine.max_num_seqs}
        sizes = sizes or {0: 1}
        self.growth.begin()
        batches: dict[int, list[Request]] = {}
        for request in requests:
            batches.setdefault(self._router.place(request, sizes), []).append(request)
        for index, batch in batches.items():
            self.supervisors[index].submit(batch)

    def poll(self, timeout_s: float) -> list[Event]:
        """Return finished rows and the sum of statistics, after waiting up to `timeout_s` for the first."""
        if self.is_abandoned:
            time.sleep(timeout_s)
            return []
        self._grow()
        if len(self.supervisors) == 1:
            return list(self._sum_up(0, self.supervisors[0].poll(timeout_s)))
        if timeout_s:
            wait_for_any((engine.pipe for engine in self.supervisors), timeout_s)
        events: list[Event] = []
        was_ready = self.is_ready
        for index, engine in enumerate(self.supervisors):
            if not engine.is_abandoned:
                num_deaths = engine.num_deaths
                events += self._sum_up(index, engine.poll(0))
                if engine.num_deaths > num_deaths:
                    self._after_death(index)
        if self.is_ready and not was_ready:
            for engine in self.supervisors:
                if not engine.is_ready:
                    self._pass_on(engine.blame.take_unblamed())
        self._end_stalled_load()
        return events

    # ---- the end

    def abandon(self) -> None:
        """End all engines for good: the rank goes on without one."""
        for engine in self.supervisors:
            engine.abandon()

    def stop(self) -> None:
        """Let the engines end while the rank continues; `close` waits for the end."""
        for engine in self.supervisors[1:]:
            if not engine.is_ready:
                engine.kill()  # while it loads, it reads no request
        for engine in self.supervisors:
            engine.stop()

    def close(self) -> None:
        """End the engines; all are asked before any is awaited."""
        self.stop()
        for engine in self.supervisors:
            engine.close()

    def kill(self) -> None:
        """End the engines immediately."""
        for engine in self.supervisors:
            engine.kill()

    # ---- events

    def _sum_up(self, index: int, events: Iterable[Event]) -> Iterator[Event]:
        """Yield an engine's finished rows, and all engines' statistics in place of its own."""
        for event in events:
            if isinstance(event, RowsFinished):
                for id in event.ids:
                    self._router.remove(id)
                yield event
            elif isinstance(event, EngineStats):
                self._calibrate(index, event)
                if event.is_sample:
                    continue
                ready = {number for number, engine in enumerate(self.supervisors) if engine.is_ready}
                working = {number for number in ready if self.supervisors[number].blame.is_busy}
                if (total := self._stats.add(index, event, ready, working, self._clock())) is not None:
                    yield total

    # ---- more engines

    def _calibrate(self, index: int, stats: EngineStats) -> None:
        is_watched = self.has_joined_all and not stats.is_sample
        if is_watched and self.growth.use_idle_memory(stats, len(self.supervisors)):
            self.has_joined_all = False
        if index == 0:
            self.growth.measure(stats)

    def _grow(self) -> None:
        """Start the processes of further engines, and let the next one load once the one before is ready."""
        if self.has_joined_all or not self.is_ready:
            return
        if not self.growth.decide():
            self._prepare()
            return
        self._drop_surplus()
        members = self._members
        joining = [engine for engine in members if not engine.has_loaded]
        if any(engine.memory.kv_bytes is not None for engine in joining):
            return  # one loads, or starts again
        if not joining and len(members) >= self.growth.count.number:
            self.has_joined_all = True
        elif not self.growth.allows_another():
            self.has_joined_all = True
            self.growth.correct(len(members) - len(joining), TOO_FEW_ROWS)
            self._drop_surplus()
        else:
            engine = joining[0] if joining else self._add_engine(self.supervisors[0].memory.spec)
            engine.join(self._text_config, self._kv_bytes)
            self._prepare()

    @property
    def _members(self) -> list[EngineSupervisor]:
        """The engines without those that did not start; such as have loaded the model come first."""
        return [engine for engine in self.supervisors if engine.has_loaded or not engine.is_abandoned]

    @property
    def _kv_bytes(self) -> int:
        """KV cache of the engines that have one."""
        return min(engine.memory.kv_bytes for engine in self.supervisors if engine.memory.kv_bytes is not None)

    def _prepare(self) -> None:
        """Start the processes that may be wanted: they import vLLM and check their options, and take no memory yet."""
        while len(self._members) < self.growth.count.number and self.growth.allows_another():
            self._add_engine(self.supervisors[0].memory.spec)

    def _drop_surplus(self) -> None:
        """End the engines that are not wanted after all; none of them has loaded."""
        surplus = self._members[self.growth.count.number :]
        for engine in surplus:
            engine.kill()
        if surplus:
            del self.supervisors[self.supervisors.index(surplus[0]) :]

    def _add_engine(self, spec: EngineSpec) -> EngineSupervisor:
        index = len(self.supervisors)
        engine = EngineSupervisor(
            lambda spec: self._start(spec, index), spec, self._limits, can_restart=self._can_restart, clock=self._clock
        )
        engine.may_load = lambda: not any(other.is_loading for other in self.supervisors)
        engine.find_heirs = lambda: self._find_heirs(engine)
        self.supervisors.append(engine)
        self._teach(engine)
        return engine

    def _teach(self, engine: EngineSupervisor) -> None:
        if self._blame is not None:
            state, engine.blame.find_canary = self._blame
            engine.blame.recall(state)

    # ---- deaths

    def _after_death(self, index: int) -> None:
        """Pass on the rows of an engine that died: all where it is abandoned, else those that can't have killed it."""
        engine = self.supervisors[index]
        if engine.is_abandoned and not engine.has_loaded and len(self._members) < self.growth.count.number:
            self.growth.correct(self.growth.count.number - 1, f"engine {index} does not start")
        if not any(other.max_num_seqs for other in self.supervisors):
            if num_waiting := sum(not other.is_abandoned for other in self.supervisors):
                what = format_count(num_waiting, "engine")
                logger.warning(f"no engine of this rank that has loaded the model is left, ending {what} that have not")
            self.abandon()  # those that have not loaded would wait for one that has
        if engine.is_abandoned and not self.is_abandoned:
            self._pass_on(engine.blame.give_up())
        elif self.is_ready:
            self._pass_on(engine.blame.take_unblamed())

    def _find_heirs(self, engine: EngineSupervisor) -> str:
        """Return who gets an engine's rows once it is abandoned."""
        has_heir = any(other.max_num_seqs for other in self.supervisors if other is not engine)
        return "this rank's other engines" if has_heir else "other ranks"

    def _pass_on(self, given_up: list[tuple[Request, int]]) -> None:
        """Give rows of an engine to others, each with the kills from outside that it saw."""
        for request, _ in given_up:
            self._router.remove(request.id)
        self.submit([request for request, _ in given_up])
        for request, num_kills in given_up:
            self.supervisors[self._router.find(request.id)].blame.add_kills(request.row, num_kills)

    def _end_stalled_load(self) -> None:
        """Let engines that have worked load before one that never has, where they wait for it and none is ready.

        It loads as long as the first one took to start: to wait for it is faster then than to start again.
        """
        joining = [
            index for index, engine in enumerate(self.supervisors) if engine.is_loading and not engine.has_loaded
        ]
        if self.is_ready or not joining:
            self._blocked_s = None
        elif self._blocked_s is None:
            self._blocked_s = self._clock()
            limit = format_duration(self.growth.start_s)
            logger.warning(f"no engine of this rank is ready, waiting up to {limit} until engine {joining[0]} is")
        elif self._clock() - self._blocked_s > self.growth.start_s:
            engine, waited = self.supervisors[joining[0]], format_duration(self._clock() - self._blocked_s)
            cause = f"the engine has not loaded the model within {waited}, for which others of its rank waited"
            engine.handle_death(EngineHung(cause, log_path=engine.log_path))
            self._after_death(joining[0])
