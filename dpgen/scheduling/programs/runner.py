"""Follow each row from the start of its program to its result: its calls go to the engine by the door of all requests.

- A row is begun once the engine has room and no call waits. Calls of rows that are begun come first, so rows end soon,
  and the memory is bounded.
- A finished call is journaled before the program goes on from it. What earlier lives have journaled is not asked again.
- If the engine is abandoned, rows go to other ranks with the records of their calls, but for those for which a
  function of the user runs now: it must not run twice.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from dpgen.config.prompt import CALL_COLUMN
from dpgen.config.tools import parse_tools
from dpgen.data.prompts.render import RenderedPrompt, RenderFn
from dpgen.errors import RowRefused
from dpgen.journal.calls import FinishedCall, encode_call
from dpgen.journal.row_notes import RENDERING, RowNote
from dpgen.records import Request, RequestId, RowResult, UndecodedRow, derive_seed, make_rejected_result
from dpgen.scheduling.preparation import NoPreparer, Preparer
from dpgen.scheduling.programs.event_loop import ProgramLoop
from dpgen.scheduling.programs.running import AskedCall, Message, ProgramEnded, ToolReturned
from dpgen.scheduling.request_builder import derive_request_seed
from dpgen.scheduling.retries.earlier_attempts import EarlierAttempts
from dpgen.scheduling.retries.retry_tracker import RetryCounts

logger = logging.getLogger(__name__)

_MAX_BEGUN_AT_ONCE = 64  # before those begun have come to their first calls
_MAX_RENDERED_AT_ONCE = 50  # calls that are rejected, before the loop has to do something else
_MAX_RENDERED_AHEAD = 64
_SETTLE_S = 0.005


@dataclass(frozen=True)
class RunnerConfig:
    """Settings of a `ProgramRunner`.

    Attributes:
        run_seed: as in `RequestBuilder`.
        max_running: `program.max_running`.
        preparer: as in `RequestBuilder`.
    """

    run_seed: int | None = None
    max_running: int = 10_000
    preparer: Preparer = field(default_factory=NoPreparer)


@dataclass
class _Row:
    """Hold a row whose program runs.

    Attributes:
        request: the row's own, with its columns as prompt; its calls have its sampling and its adapter.
        records: what the journal has of its finished calls.
        is_ended: True once there is its result, which is not taken yet.
    """

    request: Request
    is_ended: bool = False
    records: list[bytes] = field(default_factory=list)


class ProgramRunner:
    """Run rows' programs; what a `ResultRecorder` hands rows and the results of their calls to.

    Args:
        loop: runs the programs.
        render: makes a call's prompt, given ``{CALL_COLUMN: call}``.
        note: says which row's call is being rendered, should this process die.
        append_call: writes a record of `encode_call` to the journal, given the row.
        find_earlier: returns what earlier lives have journaled of a row; None for nothing.

    Attributes:
        num_calls: finished in this attempt, by the engine or by a function.
    """

    def __init__(
        self,
        config: RunnerConfig,
        loop: ProgramLoop,
        render: RenderFn,
        note: RowNote,
        append_call: Callable[[int, bytes], None],
        find_earlier: Callable[[int], EarlierAttempts[FinishedCall] | None],
    ) -> None:
        self._config, self._loop, self._render, self._note = config, loop, render, note
        self._append_call, self._find_earlier = append_call, find_earlier
        self._rows: dict[int, _Row] = {}
        self._asked: deque[AskedCall] = deque()
        self._ready: deque[Request] = deque()
        self._preparing = config.preparer.open_queue()
        self._in_flight: dict[RequestId, tuple[AskedCall, Request]] = {}
        self._finals: list[RowResult] = []
        self._num_begun_at_once = 0  # since the programs were settled
        self._has_warned = False
        self.num_calls = 0
        self.counts = RetryCounts(Counter(), 0)

    # ---- requests

    @property
    def can_begin(self) -> bool:
        """True if another row may begin: no call waits, and those just begun have come to theirs."""
        if self._loop.is_settled:
            self._num_begun_at_once = 0
        is_free = self._num_begun_at_once < _MAX_BEGUN_AT_ONCE and len(self._rows) < self._config.max_running
        return is_free and not self.has_retries

    @property
    def num_begun(self) -> int:
        """Number of rows whose programs run."""
        return len(self._rows)

    def begin(self, request: Request) -> Request | RowResult | None:
        """Begin the program of a row; `take_retry` returns its calls."""
        row, earlier = request.row, self._find_earlier(request.row)
        attempt, known = (0, []) if earlier is None else (earlier.first, earlier.current)
        self._rows[row] = _Row(request, records=list(map(encode_call, known)))
        self._num_begun_at_once += 1
        seed = derive_seed(self._config.run_seed or 0, RequestId(row, 0, 0, attempt))
        self._loop.begin(row, attempt, request.prompt, known, seed)
        return None

    @property
    def has_retries(self) -> bool:
        """True while calls wait to be taken."""
        self._handle_messages()
        return bool(self._asked or self._ready or self._preparing.has_ready)

    def take_retry(self) -> Request | None:
        """Return the request of the next call; None if there is none."""
        self._handle_messages()
        for _ in range(_MAX_RENDERED_AT_ONCE):
            self._take_prepared()
            if self._ready:
                return self._ready.popleft()
            if not self.prepare():
                return None
        return None

    def prepare(self) -> bool:
        """Render one call ahead of its admission; return False if none waits, or enough are ready."""
        self._preparing.poll()
        if not self._asked or len(self._ready) + len(self._preparing) >= _MAX_RENDERED_AHEAD:
            return False
        asked = self._asked.popleft()
        row = self._rows.get(asked.id.row)
        if row is None or row.is_ended:
            return True
        try:
            request = self._build(row.request, asked)
        except RowRefused as error:
            self._finish(asked, make_rejected_result(asked.id, error))
            return True
        self._in_flight[asked.id] = (asked, request)
        if self._config.preparer.needs(request):
            self._preparing.add(request)
        else:
            self._ready.append(request)
        return True

    @property
    def num_preparing(self) -> int:
        """Number of calls that workers prepare, or have prepared."""
        return len(self._preparing)

    def _take_prepared(self) -> None:
        """Move a call that workers have prepared to those that are ready, if none is; answer those that can't be."""
        while not self._ready and (prepared := self._preparing.take()) is not None:
            entry = self._in_flight.get(prepared.id)
            if entry is None:
                continue
            if isinstance(prepared, Request):
                self._in_flight[prepared.id] = (entry[0], prepared)
                self._ready.append(prepared)
            else:
                del self._in_flight[prepared.id]
                self._finish(entry[0], prepared)

    def _build(self, row: Request, asked: AskedCall) -> Request:
        rendered = RenderedPrompt(*self._note.run(RENDERING, row.row, self._render, {CALL_COLUMN: asked.call}))
        sampling = dict(row.sampling)
        seed = derive_request_seed(self._config.run_seed, sampling, asked.id)
        if seed is not None:
            sampling["seed"] = seed
        sampling |= asked.call.sampling
        return Request(
            asked.id, rendered.token_ids, rendered.prompt, sampling, row.adapter, rendered.num_completion_tokens
        )

    def find_tools(self, id: RequestId) -> list[dict[str, Any]] | None:
        """Return the tools that a call has offered to the model; None where it has the run's."""
        entry = self._in_flight.get(id)
        tools = None if entry is None else entry[0].call.template.get("tools")
        return None if tools is None else parse_tools(tools)

    @property
    def pending_rows(self) -> Collection[int]:
        """Rows whose programs run, or have ended with a result that `poll` returns."""
        return self._rows.keys()

    @property
    def num_checking(self) -> int:
        """1 while programs compute, or functions run: what follows is not known yet; else 0."""
        return int(bool(self._rows) and not (self._loop.is_settled and self._loop.num_tools == 0))

    def drop(self, parsing: Collection[RequestId]) -> list[bytes]:
        """Give up the rows, since there is no engine for their calls, and return the records of their calls.

        Rows for which a function runs, or a result is being parsed, are kept until that has ended. Their calls wait
        then, so that this is called again.

        Args:
            parsing: ids of the results that are being parsed.
        """
        self._handle_messages()
        dropped = set(self._loop.cancel_idle({id.row for id in parsing}))
        self._handle_messages()
        records: list[bytes] = []
        for row in dropped & self._rows.keys():
            records += self._rows.pop(row).records
        self._asked = deque(asked for asked in self._asked if self._runs(asked.id.row))
        kept = {id: request for id, (_, request) in self._in_flight.items() if self._runs(id.row)}
        self._ready = deque(request for id, request in kept.items() if id not in parsing)
        self._preparing.close()
        self._preparing = self._config.preparer.open_queue()
        self._in_flight = {id: entry for id, entry in self._in_flight.items() if id in kept or id in parsing}
        return records

    # ---- results

    def join_pieces(self, result: RowResult | UndecodedRow) -> RowResult | UndecodedRow:
        """Return the result: calls are not continued."""
        return result

    def keep_texts(self, result: RowResult) -> None:
        """Keep nothing: calls are not continued."""

    def submit(self, result: RowResult) -> RowResult | None:
        """Answer a call with its result; return the result of a row that has no program, since it was rejected."""
        entry = self._in_flight.pop(result.id, None)
        if entry is None:
            return None if result.id != RequestId(result.row) or result.row in self._rows else result
        self._finish(entry[0], result)
        return None

    def poll(self) -> list[RowResult]:
        """Return the results of the rows whose programs have ended since the last call.

        Raises:
            DpgenError: a program blocks the event loop for good.
        """
        self._loop.interrupt_if_blocked()
        self._loop.wait_until_settled(_SETTLE_S)
        self._handle_messages()
        finals, self._finals = self._finals, []
        for result in finals:
            del self._rows[result.row]
        return finals

    def close(self) -> None:
        """End the programs."""
        self._loop.close()

    def _finish(self, asked: AskedCall, result: RowResult) -> None:
        if self._runs(asked.id.row):
            self._journal(FinishedCall(asked.place, asked.asked, result))
            self._loop.deliver(result)

    def _runs(self, row: int) -> bool:
        return row in self._rows and not self._rows[row].is_ended

    def _journal(self, call: FinishedCall) -> None:
        record = encode_call(call)
        self._append_call(call.id.row, record)
        self._rows[call.id.row].records.append(record)
        self.num_calls += 1

    def _handle_messages(self) -> None:
        for message in self._loop.take_messages():
            self._handle(message)

    def _handle(self, message: Message) -> None:
        if isinstance(message, AskedCall):
            self._asked.append(message)
        elif isinstance(message, ToolReturned):
            if self._runs(message.finished.id.row):
                self._journal(message.finished)
        elif isinstance(message, ProgramEnded):
            if self._runs(message.result.row):
                self._rows[message.result.row].is_ended = True
                self._finals.append(message.result)
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"row {message.row}, call {message.place}: the program asks something else than before the restart "
                f"({message.difference}). It goes on from there, as all rows do that differ: a program should do the "
                "same each time, and draw from llm.random"
            )
