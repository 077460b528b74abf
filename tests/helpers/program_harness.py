"""Drive the programs of rows in one process, with answers that a test gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dpgen.config.prompt import CALL_COLUMN
from dpgen.data.prompts.render import RenderedPrompt
from dpgen.journal.calls import FinishedCall, decode_call
from dpgen.journal.row_notes import RowNote
from dpgen.records import Completion, Request, RequestId, RowResult, derive_row_seed
from dpgen.scheduling.programs.event_loop import ProgramLoop
from dpgen.scheduling.programs.runner import ProgramRunner, RunnerConfig
from dpgen.scheduling.programs.running import ProgramSpec
from dpgen.scheduling.retries.earlier_attempts import EarlierAttempts
from helpers.jobs import wait_for


class Harness:
    """Drive a runner as the generation loop does, with answers that a test gives."""

    def __init__(
        self, function: Callable[..., Any], known: Sequence[FinishedCall] = (), max_running: int = 100, **spec: Any
    ) -> None:
        self.records: list[FinishedCall] = []
        self.loop = ProgramLoop(ProgramSpec(function, **{"max_calls": 50, **spec}), 2)
        self.runner = ProgramRunner(
            RunnerConfig(7, max_running),
            self.loop,
            lambda row: RenderedPrompt([1], row[CALL_COLUMN].prompt),
            RowNote(),
            lambda row, record: self.records.append(decode(record)),
            lambda row: EarlierAttempts(0, [call for call in known if call.id.row == row]),
        )

    def begin(self, row: int) -> None:
        seed = derive_row_seed(7, row)
        self.runner.begin(Request(RequestId(row), None, {"q": f"row {row}"}, {"seed": seed, "top_p": 0.5}))

    def take(self, count: int) -> list[Request]:
        """Return the next requests, once there are as many."""
        taken: list[Request] = []

        def has_all() -> bool:
            while (request := self.runner.take_retry()) is not None:
                taken.append(request)
            return len(taken) >= count and self.loop.is_settled

        wait_for(has_all)
        assert len(taken) == count
        return taken

    def answer(self, request: Request, text: str) -> None:
        result = RowResult(request.row, 3, (Completion(text, "stop", 2),)).with_id(request.id)
        assert self.runner.submit(result) is None

    def finish(self, count: int = 1) -> list[RowResult]:
        """Return the results of rows, once there are as many."""
        results: list[RowResult] = []

        def has_all() -> bool:
            results.extend(self.runner.poll())
            return len(results) >= count

        wait_for(has_all)
        return results


def decode(record: bytes) -> FinishedCall:
    call = decode_call(record)
    assert call is not None
    return call
