"""Have completions checked, in worker processes where it may take long: the rank's half."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from dpgen.config.completion_checks import CheckConfig
from dpgen.config.sections import OutputConfig
from dpgen.data.input_rows import InputRows
from dpgen.engine.checking.checks import (
    CheckAnswer,
    CheckTask,
    FunctionInput,
    checks_parse_json,
    list_worker_checks,
    make_quick_check,
)
from dpgen.engine.checking.row_cache import RowCache
from dpgen.engine.starting.server_process import select_own_environment
from dpgen.errors import ConfigError
from dpgen.imports import list_import_folders
from dpgen.journal.attempts import Rejection
from dpgen.records import Completion, RequestId, RowResult
from dpgen.workers.pool import WorkerPool, WorkerRefused, WorkerSpec

_NICENESS = 5  # a check that needs much processor time must not take it from the engine

_SLOWEST_FIRST = ("function", "regex", "json_schema", "max_repetition")


class CheckedResult(NamedTuple):
    """Hold a result, and for each of its completions why it is rejected; None for one that passed."""

    result: RowResult
    rejections: tuple[Rejection | None, ...]


@dataclass
class _PendingResult:
    """Hold a result that is being checked.

    Attributes:
        rejections: for each completion; None for one that has passed, or is being checked.
        first_attempt: number of the row's first attempt of those that users count.
        num_open: completions that are being checked.
        parsed: completions that workers have read as JSON, by their place.
    """

    result: RowResult
    rejections: list[Rejection | None]
    first_attempt: int
    num_open: int
    parsed: dict[int, Completion] = field(default_factory=dict)

    def make_checked(self) -> CheckedResult:
        """Return the result with its rejections, once nothing of it is being checked."""
        result = self.result
        if self.parsed:
            completions = [self.parsed.get(place, completion) for place, completion in enumerate(result.completions)]
            result = replace(result, completions=tuple(completions))
        return CheckedResult(result, tuple(self.rejections))


class CompletionChecker:
    """Check completions, in any order: in this process what is quick, off the rank's main thread all else.

    Args:
        config: the checks.
        pool: workers that `checks.start` has made ready; None where there is nothing for them.
        rows: the input, which the user's function gets; None without such a function.
    """

    def __init__(self, config: CheckConfig, pool: WorkerPool | None = None, rows: InputRows | None = None) -> None:
        self._check_quickly, self._pool = make_quick_check(config), pool
        self._rows = None if rows is None else RowCache(rows)
        names = list_worker_checks(config)
        # The check that a worker most likely dies of, or takes too long for.
        self._slow_check = next((name for name in _SLOWEST_FIRST if name in names), "")
        self._pending: dict[RequestId, _PendingResult] = {}
        self._unsent: list[_PendingResult] = []
        self._checked: list[_PendingResult] = []

    def __len__(self) -> int:
        """Return the number of results that are being checked."""
        return len(self._pending)

    @property
    def pending_ids(self) -> Collection[RequestId]:
        """Ids of these results."""
        return self._pending.keys()

    def wait_until_ready(self, on_wait: Callable[[], None]) -> None:
        """Wait for the workers.

        Raises:
            ConfigError: the JSON Schema is none, or there is no such function.
            DpgenError: the workers died.
        """
        try:
            if self._pool is not None:
                self._pool.wait_until_ready(on_wait)
        except WorkerRefused as error:
            raise ConfigError(str(error)) from None

    def expect(self, row: int) -> None:
        """Note that completions of a row have been requested."""
        if self._rows is not None:
            self._rows.expect(row)

    def submit(self, result: RowResult, first_attempt: int = 0) -> None:
        """Add a result with completions; `poll` returns it, checked.

        Args:
            first_attempt: number of the row's first attempt of those that users count.
        """
        rejections = list(map(self._check_quickly, result.completions))
        num_open = 0 if self._pool is None else rejections.count(None)
        pending = self._pending[result.id] = _PendingResult(result, rejections, first_attempt, num_open)
        (self._unsent if num_open else self._checked).append(pending)

    def poll(self) -> list[CheckedResult]:
        """Send the results that were added to the workers, and return those that have been checked."""
        if self._pool is not None:
            for key, task in self._make_tasks():
                self._pool.submit(key, task)
            self._unsent.clear()
            for answer in self._pool.poll():
                assert isinstance(answer.key, tuple)
                id, index = answer.key
                pending = self._pending[id]
                failure = None if answer.failure is None else Rejection(self._slow_check, answer.failure)
                self._add_answer(pending, index, answer.value if failure is None else CheckAnswer(failure))
        checked, self._checked = self._checked, []
        for pending in checked:
            del self._pending[pending.result.id]
        return [pending.make_checked() for pending in checked]

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()

    def _add_answer(self, pending: _PendingResult, index: int, answer: CheckAnswer) -> None:
        pending.rejections[index] = answer.rejection
        if answer.parsed is not None or answer.parse_error is not None:
            completion = pending.result.completions[index]
            pending.parsed[index] = replace(completion, parsed=answer.parsed, parse_error=answer.parse_error)
        pending.num_open -= 1
        if not pending.num_open:
            self._checked.append(pending)

    def _make_tasks(self) -> Iterator[tuple[tuple[RequestId, int], CheckTask]]:
        """Yield a task for each completion that workers must check."""
        by_row: dict[int, list[_PendingResult]] = {}
        for pending in self._unsent:
            by_row.setdefault(pending.result.row, []).append(pending)
        columns_of_rows: Iterable[dict[str, Any] | None] = [None] * len(by_row)
        if self._rows is not None and by_row:
            columns_of_rows = self._rows.read(list(by_row))
        for columns, results in zip(columns_of_rows, by_row.values(), strict=True):
            for pending in results:
                yield from _make_tasks_of_result(pending, columns)


def _make_tasks_of_result(
    pending: _PendingResult, columns: dict[str, Any] | None
) -> Iterator[tuple[tuple[RequestId, int], CheckTask]]:
    result = pending.result
    for index, completion in enumerate(result.completions):
        if pending.rejections[index] is None:
            numbers = (result.sample + index, result.attempt - pending.first_attempt)
            for_function = None if columns is None else _select_input(completion, columns, *numbers)
            yield (result.id, index), CheckTask(completion.text, completion.parsed, for_function)


def _select_input(completion: Completion, columns: dict[str, Any], sample: int, attempt: int) -> FunctionInput:
    """Return what a function gets; of log-probabilities, the token ids alone."""
    logprobs = completion.logprobs
    return FunctionInput(
        columns,
        completion.finish_reason,
        completion.num_tokens,
        completion.reasoning,
        completion.tool_calls,
        completion.token_ids if logprobs is None else logprobs.token_ids.tolist(),
        sample,
        attempt,
    )


def start_completion_checker(
    config: CheckConfig, output: OutputConfig, rows: InputRows, log: Callable[[str], None]
) -> CompletionChecker | None:
    """Start the workers that a configuration asks for; None if it asks for no checks.

    Args:
        output: says whether texts are read as JSON, too; see `checks_parse_json`.
        log: takes each line that the workers print.
    """
    if not config.is_used:
        return None
    if not list_worker_checks(config):
        return CompletionChecker(config)
    environment = select_own_environment(os.environ)
    environment["CUDA_VISIBLE_DEVICES"] = ""  # checks must not take memory from the engine
    environment["PYTHONPATH"] = os.pathsep.join(list_import_folders())
    workers = WorkerSpec(
        "the check",
        "dpgen.engine.checking.checks:start",
        (config, checks_parse_json(config, output)),
        environment,
        num_workers=config.num_workers,
        timeout_s=config.timeout_s,
        niceness=_NICENESS,
    )
    return CompletionChecker(config, WorkerPool(workers, log), rows if config.function is not None else None)
