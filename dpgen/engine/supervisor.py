"""An engine that comes back: watches one engine process, starts it anew when it dies or hangs, and finds poison rows.

The rows given to an engine stay in this process's hands until they are finished, so a dead engine loses nothing:
its rows go to its successor. A row that was in flight at two deaths is tried alone, and one that kills its engine
when alone is recorded as a poison row. An engine that dies again and again without finishing a row is given up.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from dpgen.engine.messages import (
    EngineInfo,
    EngineReady,
    EngineSpec,
    EngineStats,
    EngineTextConfig,
    Event,
    KvBytesMeasured,
    OptionsChecked,
    RowsFinished,
    UndecodedRow,
)
from dpgen.errors import ConfigError, EngineError, LockstepEngineLost
from dpgen.formatting import format_count
from dpgen.records import Request, RowError, RowResult

E = TypeVar("E", OptionsChecked, KvBytesMeasured, EngineReady)

_ISOLATE_AFTER_DEATHS = 2
_MAX_ISOLATED_KILLS = 4  # a row is hardly to blame for one SIGKILL; for so many, all while it was alone, it is
_START_WAIT_S = 0.2  # between looks at the other ranks while an engine starts


class EngineHandle(Protocol):
    """What the supervisor needs of an engine process; see `dpgen.engine.process.EngineProcess`."""

    def load_model(self, text: EngineTextConfig, kv_bytes: int | None = None) -> None: ...

    def set_kv_bytes(self, num_bytes: int) -> None: ...

    def submit(self, requests: list[Request]) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...

    def kill(self) -> None: ...


class EngineSupervisor:
    """One rank's engine, through all its lives.

    Args:
        start: starts a process from a spec.
        spec: what to start; adapted when memory runs out.
        say: prints a line.
        timeout_s: how long an engine with work may be silent before it counts as hung.
        start_timeout_s: the same, from a process's start until it has loaded the model.
        max_deaths: deaths in a row, without a finished row between them, after which the engine is given up.
        stands_alone: whether a new process can take a dead one's place; one that steps together with others can't be
            replaced alone, and its death ends the run, resumable.
    """

    def __init__(
        self,
        start: Callable[[EngineSpec], EngineHandle],
        spec: EngineSpec,
        say: Callable[[str], None],
        *,
        timeout_s: float,
        start_timeout_s: float,
        max_deaths: int,
        can_restart: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start, self._spec, self._say, self._clock = start, spec, say, clock
        self._max_deaths = max_deaths
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._stands_alone = can_restart
        self._process: EngineHandle | None = start(spec)
        self._info: EngineInfo | None = None
        self._kv_bytes: int | None = None
        self._text = EngineTextConfig()
        self._is_ready = False
        self._last_event_s = clock()
        self._in_flight: dict[int, Request] = {}  # rows that the engine has
        self._waiting: deque[Request] = deque()  # rows for it, while it can't take them
        self._quarantined: deque[Request] = deque()  # rows to be tried alone
        self._deaths_of_row: Counter[int] = Counter()
        self._isolated_deaths: Counter[int] = Counter()
        self._deaths_in_a_row = 0
        self.num_deaths = 0
        self._earlier_stats = EngineStats()  # the counts of earlier lives
        self._stats = EngineStats()

    # ---- start-up: the caller waits, since nothing can be generated yet

    def check_options(self, on_wait: Callable[[], None]) -> tuple[str, ...]:
        """The engine's word on its options: notes for the log.

        Raises:
            ConfigError: an option is illegal.
            EngineError: the engine died.
        """
        while True:
            try:
                checked = self._wait_for(OptionsChecked, on_wait)
            except EngineError as error:
                self._restart_or_raise(error)
                continue
            if checked.problem is not None:
                raise ConfigError(checked.problem)
            return checked.notes

    def load_model(
        self,
        agree_kv: Callable[[int], int],
        on_wait: Callable[[], None],
        text: EngineTextConfig = EngineTextConfig(),  # noqa: B008 - frozen
    ) -> EngineInfo:
        """Loads the model; with less, if memory runs out.

        Args:
            agree_kv: measured bytes of free KV memory → the bytes to use.
            text: which work on text comes with it.

        Raises:
            EngineError: it can't be loaded.
        """
        self._text = text
        while self._info is None:
            try:
                assert self._process is not None
                self._last_event_s = self._clock()
                self._process.load_model(text)
                measured = self._wait_for(KvBytesMeasured, on_wait).num_bytes
                if self._kv_bytes is None:  # agreed once: the other ranks do not ask again
                    self._kv_bytes = agree_kv(measured)
                    self._last_event_s = self._clock()  # it was the other ranks that were waited for
                self._process.set_kv_bytes(min(self._kv_bytes, measured))
                self._info = self._wait_for(EngineReady, on_wait).info
            except EngineError as error:
                self._restart_or_raise(error)
                self.check_options(on_wait)
        self._deaths_in_a_row = 0
        self._is_ready = True
        self._last_event_s = self._clock()
        return self._info

    def _restart_or_raise(self, error: EngineError) -> None:
        """After a death before the engine was ready: worth another start, or a fault that will be there again?"""
        if not self._stands_alone:
            raise error
        self.num_deaths += 1
        self._deaths_in_a_row += 1
        smaller = error.is_out_of_memory and self._reduce_memory(error)
        if not (smaller or error.signal) or self._has_no_restarts_left:
            raise error
        self._say(f"{error} while it was starting; starting it again")
        self._last_event_s = self._clock()
        self._process = self._start(self._spec)

    def _wait_for(self, kind: type[E], on_wait: Callable[[], None]) -> E:
        assert self._process is not None
        while True:
            on_wait()
            for event in self._process.poll(_START_WAIT_S):
                if isinstance(event, kind):
                    self._last_event_s = self._clock()
                    return event
                raise EngineError(f"the engine said {type(event).__name__} where {kind.__name__} was due")
            self._raise_if_hung()

    # ---- generating: nothing here waits for an engine

    @property
    def max_num_seqs(self) -> int:
        """Sequences that the engine runs at a time; 0 once it is lost."""
        return 0 if self._info is None or self.is_abandoned else self._info.max_num_seqs

    @property
    def is_abandoned(self) -> bool:
        """Whether the engine was given up; its unfinished rows are whoever's who takes them."""
        return self._process is None

    def submit(self, requests: list[Request]) -> None:
        """Gives rows to the engine, now or as soon as it can take them."""
        self._waiting.extend(requests)
        self._submit_waiting()

    def poll(self, timeout_s: float) -> list[Event]:
        """Finished rows and numbers, waiting up to `timeout_s` for a first one; starts a dead engine anew."""
        if self._process is None:
            time.sleep(timeout_s)
            return []
        events: list[Event] = []
        try:
            for event in self._process.poll(timeout_s):
                events += self._handle_event(event)
            self._raise_if_hung()
        except EngineError as error:
            events += self._handle_death(error)
        self._submit_waiting()
        return events

    def stop(self) -> None:
        """Has the engine end while its rank goes on, if there is one; `close` waits for it."""
        if self._process is not None:
            self._process.stop()

    def close(self) -> None:
        """Ends the engine, if there is one."""
        if self._process is not None:
            self._process.close()

    def kill(self) -> None:
        """Ends the engine at once, if there is one."""
        if self._process is not None:
            self._process.kill()

    def _attach_prompt(self, undecoded: UndecodedRow) -> UndecodedRow:
        request = self._in_flight.pop(undecoded.result.row)
        return dataclasses.replace(undecoded, prompt_token_ids=request.prompt_token_ids or ())

    def _handle_event(self, event: Event) -> Iterable[Event]:
        self._last_event_s = self._clock()
        if isinstance(event, RowsFinished):
            self._deaths_in_a_row = 0
            for result in event.results:
                self._in_flight.pop(result.row)
            yield RowsFinished(event.results, [self._attach_prompt(each) for each in event.undecoded])
        elif isinstance(event, EngineStats):
            self._stats = event
            yield event.add_counts(self._earlier_stats)
        elif isinstance(event, OptionsChecked):
            assert self._process is not None
            if event.problem is not None:
                raise EngineError(f"the engine refused its options: {event.problem}")
            self._process.load_model(self._text, self._kv_bytes)
        elif isinstance(event, EngineReady):
            self._info = event.info
            self._is_ready = True
            self._say(f"the engine is back, with {format_count(self._num_unfinished, 'row')} to go on with")

    def _submit_waiting(self) -> None:
        """Gives the engine what waits for it; rows under suspicion go in alone, before all others."""
        if not self._is_ready or self._process is None:
            return
        try:
            if self._quarantined:
                if not self._in_flight:
                    self._submit_now([self._quarantined.popleft()])
            elif self._waiting and not self._is_isolating_row:
                self._submit_now(list(self._waiting))
                self._waiting.clear()
        except EngineError as error:
            self._handle_death(error)

    def _submit_now(self, requests: list[Request]) -> None:
        assert self._process is not None
        if not self._in_flight:
            self._last_event_s = self._clock()  # an idle engine says nothing, and that is no silence
        self._in_flight |= {request.row: request for request in requests}
        self._process.submit(requests)

    @property
    def _is_isolating_row(self) -> bool:
        return len(self._in_flight) == 1 and self._deaths_of_row[next(iter(self._in_flight))] >= _ISOLATE_AFTER_DEATHS

    @property
    def _num_unfinished(self) -> int:
        return len(self._in_flight) + len(self._waiting) + len(self._quarantined)

    def _raise_if_hung(self) -> None:
        silent_s = self._clock() - self._last_event_s
        if self._is_ready:
            limit_s, what = self._timeout_s, "while it had work (run.engine_timeout_s)"
        else:
            limit_s, what = self._start_timeout_s, "while it was starting (run.engine_start_timeout_s)"
        if silent_s > limit_s and (self._in_flight or not self._is_ready):
            raise EngineError(f"the engine said nothing for {silent_s:.0f} s {what}")

    def _handle_death(self, error: EngineError) -> list[Event]:
        """After a death: blames, starts a successor, and gives the result of a row that is now known as poison."""
        assert self._process is not None
        self._process.kill()
        if not self._stands_alone:
            raise LockstepEngineLost(error.first_line)
        self.num_deaths += 1
        self._deaths_in_a_row += 1
        self._earlier_stats, self._stats = self._stats.add_counts(self._earlier_stats), EngineStats()
        poison = self._attribute_death(error)
        if self._has_no_restarts_left:
            self._say(f"{error}; given up after {format_count(self._deaths_in_a_row, 'death')} in a row")
            self._process = None
            return poison
        self._say(f"{error}; starting it again")
        if error.is_out_of_memory:
            self._reduce_memory(error)
        self._is_ready = False
        self._last_event_s = self._clock()
        self._process = self._start(self._spec)
        return poison

    def _attribute_death(self, error: EngineError) -> list[Event]:
        was_alone = self._is_isolating_row
        inside, self._in_flight = list(self._in_flight.values()), {}
        if was_alone and not error.is_out_of_memory:
            [poison] = inside
            self._isolated_deaths[poison.row] += 1
            if error.is_external_kill and self._isolated_deaths[poison.row] < _MAX_ISOLATED_KILLS:
                self._quarantined.append(poison)  # behind the others, to be tried again
                return []
            self._deaths_in_a_row = 0  # something was found out
            self._say(f"row {poison.row} kills its engine, also when it is alone there; it is recorded as an error")
            message = f"this row killed its engine, alone: {error.first_line}"
            return [RowsFinished([RowResult(poison.row, error=RowError("poison_row", message))])]
        self._deaths_of_row.update(request.row for request in inside)
        for request in reversed(inside):
            if self._deaths_of_row[request.row] >= _ISOLATE_AFTER_DEATHS and not error.is_out_of_memory:
                self._quarantined.appendleft(request)
            else:
                self._waiting.appendleft(request)
        return []

    @property
    def _has_no_restarts_left(self) -> bool:
        return self._deaths_in_a_row >= self._max_deaths

    def _reduce_memory(self, error: EngineError) -> bool:
        """Makes the next life smaller: fewer sequences first, then less of the GPU's memory. False if it can't."""
        options = dict(self._spec.options)
        num_seqs = options.get("max_num_seqs") or (self._info.max_num_seqs if self._info else 256)
        if self._deaths_in_a_row <= 2 and num_seqs > 1:
            options["max_num_seqs"] = max(1, num_seqs // 2)
            self._say(f"out of memory ({error.first_line}); going on with max_num_seqs={options['max_num_seqs']}")
        elif self._kv_bytes is not None:
            self._kv_bytes = self._kv_bytes * 8 // 10
            self._say(f"out of memory ({error.first_line}); going on with a KV cache of {self._kv_bytes >> 20} MiB")
        elif "kv_cache_memory_bytes" in options:
            options["kv_cache_memory_bytes"] = options["kv_cache_memory_bytes"] * 8 // 10
            self._say(f"out of memory ({error.first_line}); going on with kv_cache_memory_bytes a fifth lower")
        else:
            share = round(float(options.get("gpu_memory_utilization", 0.9)) - 0.1, 2)
            if share <= 0:
                return False
            options["gpu_memory_utilization"] = share
            self._say(f"out of memory ({error.first_line}); going on with gpu_memory_utilization={share}")
        self._spec = dataclasses.replace(self._spec, options=options)
        return True
