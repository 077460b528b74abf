"""Supervise one rank's engine: restart it when it dies or hangs.

- A row stays in this process until its result arrives. A dead engine loses no row: the next life gets them all.
- `dpgen.engine.blame` decides which rows the engine gets next, and finds the rows that kill it.
- Every life uses the KV cache size that the ranks agreed on, or less once memory ran out.
- An engine is abandoned after `max_deaths` deaths in a row without a finished row; other ranks claim its rows.
- Only start-up waits for the engine. `submit` returns immediately, `poll` after its timeout.

Limits: an engine that steps together with others is not restarted. Its death ends the run, resumable.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from dpgen.engine.blame import BlameTracker
from dpgen.engine.handle import EngineHandle
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
)
from dpgen.engine.pool.stats_sum import LifeStats
from dpgen.engine.process import warn_if_stuck
from dpgen.engine.progress_watch import ProgressWatch
from dpgen.engine.starting.early_events import START_WAIT_S, EarlyEvents
from dpgen.engine.starting.limits import MAX_STARTS, EngineLimits, EngineMemory, format_delay
from dpgen.errors import ConfigError, EngineError, EngineHung, EngineStuck, LockstepEngineLost
from dpgen.formatting import format_count
from dpgen.records import Request, RowResult, UndecodedRow

logger = logging.getLogger(__name__)


class EngineSupervisor:
    """Run one rank's engine through all its lives.

    Args:
        start: starts a process from a spec.
        spec: the engine to start.
        limits: when the engine counts as hung, and when it is abandoned.
        can_restart: False for an engine that steps together with others: its death ends the run, resumable.
        clock: seconds that only increase.

    Attributes:
        blame: this engine's rows, and what their engine's deaths say about them.
        max_model_len: tokens of prompt and completion together; 0 before the model is loaded.
        start_phases: what the engine did until it was ready, as (name, seconds), whatever the rank did meanwhile.
        memory: what the next life is started with.
        find_heirs: returns who gets its rows once it is abandoned, for the log.
        may_load: False while other engines on its devices load: each would count their memory as its own.
        final_death: how the engine died, if it can't be restarted; None while it lives.
    """

    def __init__(
        self,
        start: Callable[[EngineSpec], EngineHandle],
        spec: EngineSpec,
        limits: EngineLimits,
        *,
        can_restart: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start, self._limits, self._clock = start, limits, clock
        self.memory = EngineMemory(spec)
        self._can_restart = can_restart
        self._process: EngineHandle | None = start(spec)
        self._info: EngineInfo | None = None
        self._text_config = EngineTextConfig()
        self._notes: tuple[str, ...] | None = None  # of this life's check of its options
        self._is_loading = self._has_kv_bytes = self._is_ready = False
        self._measured_kv_bytes: int | None = None  # by this life
        self._start_due_s: float | None = None  # when the next life begins, where it waits
        self._num_start_retries = 0
        self._watch = ProgressWatch(limits, clock)
        self._early_events = EarlyEvents(self._watch)
        self.blame = BlameTracker()
        self.find_heirs: Callable[[], str] = lambda: "other ranks"
        self.may_load: Callable[[], bool] = lambda: True
        self.final_death: EngineError | None = None
        self._deaths_in_a_row = self.num_deaths = self.max_model_len = 0
        self.start_phases: tuple[tuple[str, float], ...] = ()
        self._stats = LifeStats()

    # ---- start-up: the caller waits, since nothing can be generated yet

    def begin_loading(self, kv_bytes: int | None = None) -> None:
        """Let this life of the engine load its model once it has checked its options; `load_model` waits for it."""
        if self._process is not None and not self._is_loading:
            self._is_loading = True
            self._watch.mark()
            self._process.load_model(kv_bytes)

    def check_options(self, on_wait: Callable[[], None]) -> tuple[str, ...]:
        """Wait for the engine's check of its options, and return notes for the log.

        Raises:
            ConfigError: an option is illegal.
            EngineError: the engine died.
        """
        while self._notes is None:
            assert self._process is not None
            try:
                checked = self._early_events.wait_for(OptionsChecked, self._process, on_wait)
            except EngineError as error:
                self._restart_or_raise(error, on_wait)
                continue
            if checked.problem is not None:
                raise ConfigError(checked.problem)
            self._note_options(checked)
        return self._notes

    def load_model(
        self,
        agree_kv: Callable[[int], int],
        on_wait: Callable[[], None],
        text_config: EngineTextConfig = EngineTextConfig(),  # noqa: B008 - frozen
    ) -> EngineInfo:
        """Load the model, with lower limits if memory runs out.

        If `agree_kv` or `on_wait` raises, the engine goes on loading, and another call continues the wait.

        Args:
            agree_kv: measured bytes of free KV memory → the bytes to use; not called again once it has returned,
                whatever the number of lives.
            on_wait: called again and again while the engine loads.
            text_config: the engine's part of the work on text.

        Raises:
            EngineError: the model cannot be loaded.
        """
        self._text_config = text_config
        while self._info is None:
            try:
                self.check_options(on_wait)
                self._load_once(agree_kv, on_wait)
            except EngineError as error:
                self._restart_or_raise(error, on_wait)
        self._deaths_in_a_row = 0
        return self._info

    def _load_once(self, agree_kv: Callable[[int], int], on_wait: Callable[[], None]) -> None:
        """Load the model in this life; each step is done once."""
        assert self._process is not None
        self.begin_loading()
        if self._measured_kv_bytes is None:
            self._measured_kv_bytes = self._early_events.wait_for(KvBytesMeasured, self._process, on_wait).num_bytes
        if self.memory.kv_bytes is None:  # agreed once: the other ranks do not ask again
            self.memory.kv_bytes = agree_kv(self._measured_kv_bytes)
            self._watch.mark()  # the wait for other ranks is not the engine's silence
        if not self._has_kv_bytes:
            self._has_kv_bytes = True
            self._process.set_kv_bytes(min(self.memory.kv_bytes, self._measured_kv_bytes))
            self._process.set_text_config(self._text_config)
        self._set_ready(self._early_events.wait_for(EngineReady, self._process, on_wait))

    def join(self, text_config: EngineTextConfig, kv_bytes: int) -> None:
        """Load the model as `poll` is called: this engine joins others, whose KV cache has been agreed on."""
        self._text_config, self.memory.kv_bytes = text_config, kv_bytes

    def abandon(self) -> None:
        """End the engine for good: its rank goes on without one."""
        if self._process is not None:
            self._process.show_errors()
        self.kill()
        self._process = None

    # ---- generating: nothing here waits for an engine

    @property
    def pipe(self) -> Connection | None:
        """What to wait on beside other engines' pipes; None while there is nothing to wait for."""
        return None if self._process is None or self._start_due_s is not None else self._process.pipe

    @property
    def max_num_seqs(self) -> int:
        """Sequences that the engine runs at a time; 0 once it is abandoned."""
        return 0 if self._info is None or self.is_abandoned else self._info.max_num_seqs

    @property
    def is_ready(self) -> bool:
        """True while the engine has loaded its model."""
        return self._is_ready

    @property
    def has_loaded(self) -> bool:
        """True once a life of the engine has loaded its model."""
        return self._info is not None

    @property
    def is_loading(self) -> bool:
        """True while a life of the engine loads the model, and so measures the memory that is free."""
        return self._is_loading and not self._is_ready and self._process is not None and self._start_due_s is None

    @property
    def is_abandoned(self) -> bool:
        """True once the engine is abandoned; other ranks then claim its unfinished rows."""
        return self._process is None

    def submit(self, requests: list[Request]) -> None:
        """Give rows to the engine, now or as soon as it can take them."""
        self.blame.add(requests)
        self._submit_waiting()

    def poll(self, timeout_s: float) -> list[Event]:
        """Return finished rows and stats, after waiting up to `timeout_s` for the first; restart a dead engine."""
        if self._process is None:
            time.sleep(timeout_s)
            return []
        if self._start_due_s is not None:
            if self._clock() < self._start_due_s:
                time.sleep(timeout_s)
                return []
            self._start_again()
        events: list[Event] = []
        try:
            for event in self._process.poll(timeout_s):
                events += self._handle_event(event)
            self._load_beside_others()
            self._watch.raise_if_hung(self.log_path, is_ready=self._is_ready, is_busy=self.blame.is_busy)
        except EngineError as error:
            self.handle_death(error)
        self._submit_waiting()
        return events

    def stop(self) -> None:
        """Let the engine end while its rank continues; `close` waits for the end."""
        if self.is_loading:
            self.kill()  # it reads no message before it has loaded
        elif self._process is not None:
            self._process.stop()

    def close(self) -> None:
        """End the engine."""
        if self._process is not None:
            warn_if_stuck(self._process.close)

    def kill(self) -> None:
        """End the engine immediately."""
        if self._process is not None:
            warn_if_stuck(self._process.kill)

    # ---- messages from the engine

    def _handle_event(self, event: Event) -> Iterable[Event]:
        self._watch.note(event)
        if isinstance(event, RowsFinished):
            yield from self._handle_finished(event)
        elif isinstance(event, EngineStats):
            yield self._stats.add(event)
        elif isinstance(event, OptionsChecked):
            if event.problem is not None:
                raise EngineError(f"the engine rejected its options: {event.problem}", log_path=self.log_path)
            self._note_options(event)
        elif isinstance(event, EngineReady):
            self._set_ready(event)
            if self.num_deaths:
                logger.warning(f"engine restarted, resuming {format_count(self.blame.num_unfinished, 'row')}")

    def _load_beside_others(self) -> None:
        """Let a life that has checked its options load the model, once the KV cache is known and no other one loads."""
        if self._process is None or self._start_due_s is not None or self._notes is None or self._is_loading:
            return
        self._watch.mark()  # it waits for its rank
        if self.memory.kv_bytes is not None and self.may_load():
            self.begin_loading(self.memory.kv_bytes)
            self._process.set_text_config(self._text_config)

    def _note_options(self, checked: OptionsChecked) -> None:
        self._notes = checked.notes
        self.memory.record_options(checked)

    def _set_ready(self, ready: EngineReady) -> None:
        self._info, self._is_ready, self.max_model_len = ready.info, True, ready.info.max_model_len
        self.start_phases = ready.phases
        self.memory.record_start(ready.info.max_num_seqs)
        self._watch.mark()

    def _handle_finished(self, event: RowsFinished) -> Iterable[Event]:
        """Yield the rows without the canary's result, and the verdicts for which they are the witnesses."""
        results = [result for result in event.results if self._finish(result) is not None]
        undecoded_rows: list[UndecodedRow] = []
        for undecoded in event.undecoded:
            if (request := self._finish(undecoded.result)) is not None:
                prompt = request.prompt_token_ids or ()
                undecoded_rows.append(dataclasses.replace(undecoded, prompt_token_ids=prompt))
        results += self.blame.take_verdicts()
        if results or undecoded_rows:
            yield RowsFinished(results, undecoded_rows)

    def _finish(self, result: RowResult) -> Request | None:
        request = self.blame.finish(result)
        if result.error is None:
            self._deaths_in_a_row = 0
        if request is None:  # the canary's tokens are no part of the result
            self._stats.drop_generated(result.num_generated_tokens)
        return request

    @property
    def log_path(self) -> Path | None:
        """Where the newest life's output is."""
        return None if self._process is None else self._process.log_path

    # ---- rows to the engine

    def _submit_waiting(self) -> None:
        is_idle = not self.blame.is_busy
        if self._is_ready and self._process is not None and (batch := self.blame.take_batch()):
            if is_idle:
                self._watch.mark()  # an idle engine sends nothing; its silence counts from now on
            self._process.submit(batch)

    # ---- deaths

    def _restart_or_raise(self, error: EngineError, on_wait: Callable[[], None]) -> None:
        """Restart an engine that died before it was ready, or raise the error once it is not worth another start."""
        try:
            self._restart(error, on_wait)
        except EngineError:
            if self._process is not None:
                self._process.show_errors()
            raise

    def _restart(self, error: EngineError, on_wait: Callable[[], None]) -> None:
        """Start the engine again, or raise the error.

        A start is tried again at once with less memory or after a signal, twice after any other failure. A start that
        took longer than its limit, or that no memory would help, is not tried again.
        """
        is_final = isinstance(error, EngineHung | EngineStuck) or error.is_context_too_long
        if not self._can_restart or is_final or self.memory.blames_given_cache(error):
            raise error
        self.num_deaths += 1
        self._deaths_in_a_row += 1
        change = self.memory.reduce_after(error, self._deaths_in_a_row)
        is_immediate = bool(change or error.signal)
        self._num_start_retries += not is_immediate
        if self._num_start_retries >= MAX_STARTS or self._deaths_in_a_row >= self._limits.max_deaths:
            raise error
        assert self._process is not None
        self._process.kill()
        delay_s = 0 if is_immediate else self._limits.start_retry_s
        logger.warning(error.describe(f"retrying its start-up{change}{format_delay(delay_s)}"))
        due_s = self._clock() + delay_s
        while self._clock() < due_s:
            on_wait()
            time.sleep(min(START_WAIT_S, delay_s))
        self._start_again()

    def handle_death(self, error: EngineError) -> None:
        """Restart the engine, or abandon it and leave its rows, unblamed, to the other ranks."""
        assert self._process is not None
        try:
            self._process.kill()
        except EngineStuck as stuck:
            error = stuck
        if not self._can_restart:
            self.final_death = error
            self._process.show_errors()
            raise LockstepEngineLost(error.summarize())
        self.num_deaths += 1
        self._deaths_in_a_row += 1
        self._stats.end_life()
        self.blame.record_death(error)
        reason = self._limits.find_reason_to_abandon(
            error, self._deaths_in_a_row, self.blame.sickness, has_loaded=self.has_loaded
        )
        if reason is not None:
            rows = format_count(self.blame.num_unfinished, "row")
            self._process.show_errors()
            leaving = f", leaving {rows} to {self.find_heirs()}" if self.has_loaded else ""  # it has had none
            logger.warning(error.describe(f"abandoning it{reason}{leaving}"))
            self._process = None
            return
        change = self.memory.reduce_after(error, self._deaths_in_a_row)
        is_immediate = self._is_ready or bool(change or error.signal)
        delay_s = 0 if is_immediate else self._limits.start_retry_s  # a start that failed may need time to succeed
        logger.warning(error.describe(f"restarting it{change}{format_delay(delay_s)}"))
        self._is_ready, self._start_due_s = False, self._clock() + delay_s
        if is_immediate:
            self._start_again()

    def _start_again(self) -> None:
        self._is_loading = self._has_kv_bytes = self._is_ready = False
        self._notes = self._measured_kv_bytes = None
        self._early_events.clear()
        self._watch.begin_life()
        self._process, self._start_due_s = self._start(self.memory.spec), None
