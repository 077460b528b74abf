"""Find the first call of a row's program, for a preview: the program runs until it asks the model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpgen.config.prompt import CALL_COLUMN
from dpgen.data.prompts.render import RenderedPrompt, RenderFn
from dpgen.data.time_limit import limit_render_time
from dpgen.errors import RenderTimeout, RowRefused
from dpgen.records import Request, RequestId, derive_seed
from dpgen.scheduling.programs.running import AskedCall, Message, ProgramEnded, ProgramSpec, RunningProgram, make_task
from dpgen.scheduling.request_builder import RequestBuilder

_MAX_PATIENCE_S, _MIN_PATIENCE_S = 2.0, 0.1


class FirstCallBuilder:
    """Build the request of the first call of a row's program, in place of a row's own request.

    Args:
        rows: builds what a program begins with.
        render: makes a call's prompt.
    """

    def __init__(self, spec: ProgramSpec, rows: RequestBuilder, render: RenderFn) -> None:
        self.spec, self._rows, self._render = spec, rows, render
        self._loop = asyncio.new_event_loop()
        self._loop.set_task_factory(make_task)
        self._loop.set_exception_handler(lambda loop, context: None)
        self._first: asyncio.Future[Message] = self._loop.create_future()
        self._patience_s = _MAX_PATIENCE_S

    def build(self, row: int, columns: Mapping[str, Any]) -> Request:
        """Return the request.

        Raises:
            RowRefused: the program ends before it asks the model, or calls a function, which a preview does not run.
        """
        begun = self._rows.build(row, columns)
        self._first = self._loop.create_future()
        program = RunningProgram(row, 0, (), derive_seed(self._rows.run_seed or 0, RequestId(row)), self)
        program.begin(self._loop, columns)
        message = self._run(program)
        if isinstance(message, ProgramEnded):
            error = message.result.error
            if error is None:
                raise RowRefused("program_failed", "it ends without a call, so there is no prompt to show")
            raise RowRefused(error.type, error.message)
        assert isinstance(message, AskedCall)
        rendered = RenderedPrompt(*self._render({CALL_COLUMN: message.call}))
        sampling = {**begun.sampling, **message.call.sampling}
        num_completion_tokens = rendered.num_completion_tokens
        return Request(begun.id, rendered.token_ids, rendered.prompt, sampling, begun.adapter, num_completion_tokens)

    def _run(self, program: RunningProgram) -> Message:
        """Return a program's first message, and end it.

        Raises:
            RowRefused: `program_timeout`; a later row that waits, too, gets less time.
        """
        limit_s = min(self._patience_s, self.spec.timeout_s)
        started_s = time.monotonic()
        message: Message | None = None
        try:
            with contextlib.suppress(RenderTimeout):
                message = limit_render_time(self._loop.run_until_complete, limit_s)(self._first)
            elapsed_s = time.monotonic() - started_s
            # A program that keeps the loop for itself is interrupted, and ends by that.
            if message is None or (isinstance(message, ProgramEnded) and elapsed_s > limit_s):
                self._patience_s = max(_MIN_PATIENCE_S, self._patience_s / 4)
                raise RowRefused("program_timeout", f"it asks the model nothing for {elapsed_s:.1f} s")
            return message
        finally:
            program.cancel()
            with contextlib.suppress(RenderTimeout):
                limit_render_time(self._loop.run_until_complete, limit_s)(asyncio.sleep(0))

    def send(self, message: Message) -> None:
        """Take the first message; see `Host`."""
        if not self._first.done():
            self._first.set_result(message)

    async def run_function(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run nothing, and end the program; see `Host`."""
        if not self._first.done():
            why = "it calls a function before it asks the model, and a preview runs none"
            self._first.set_exception(RowRefused("program_failed", why))
        raise asyncio.CancelledError
