"""Have completions checked in worker processes: the rank's half."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dpgen.config.sections import CheckConfig
from dpgen.data.input_rows import InputRows
from dpgen.engine.checking.checks import CheckTask
from dpgen.engine.process import select_own_environment
from dpgen.errors import ConfigError
from dpgen.journal.attempts import Rejection
from dpgen.records import Completion, RequestId, RowResult
from dpgen.workers.pool import WorkerPool, WorkerRefused, WorkerSpec


class CheckedResult(NamedTuple):
    """Hold a result, and for each of its completions why it is rejected; None for one that passed."""

    result: RowResult
    rejections: tuple[Rejection | None, ...]


class CompletionChecker:
    """Check completions, off the rank's main thread and in any order.

    Args:
        pool: workers that `checks.start` has made ready.
        rows: the input, if the checks need it; else None.
        slow_check: name of the check that a worker most likely dies of, or takes too long for.
    """

    def __init__(self, pool: WorkerPool, rows: InputRows | None = None, slow_check: str = "function") -> None:
        self._pool, self._rows, self._slow_check = pool, rows, slow_check
        self._results: dict[RequestId, RowResult] = {}  # requests whose completions are being checked
        self._verdicts: dict[RequestId, dict[int, Rejection | None]] = {}

    def __len__(self) -> int:
        """Return the number of results that are being checked."""
        return len(self._results)

    @property
    def pending_ids(self) -> Collection[RequestId]:
        """Ids of these results."""
        return self._results.keys()

    def wait_until_ready(self, on_wait: Callable[[], None]) -> None:
        """Wait for the workers.

        Raises:
            ConfigError: the JSON Schema is none, or there is no such function.
            DpgenError: the workers died.
        """
        try:
            self._pool.wait_until_ready(on_wait)
        except WorkerRefused as error:
            raise ConfigError(str(error)) from None

    def submit(self, result: RowResult, first_attempt: int = 0) -> None:
        """Add a result with completions; `poll` returns it, checked.

        Args:
            first_attempt: number of the row's first attempt of those that users count.
        """
        self._results[result.id], self._verdicts[result.id] = result, {}
        columns: dict[str, Any] = {}
        if self._rows is not None:
            [columns] = self._rows.iter_rows(np.array([result.row]), self._rows.columns)
        for index, completion in enumerate(result.completions):
            task = CheckTask(
                _drop_candidates(completion), columns, result.sample + index, result.attempt - first_attempt
            )
            self._pool.submit((result.id, index), task)

    def poll(self) -> list[CheckedResult]:
        """Return the results whose completions have all been checked since the last call."""
        checked = []
        for answer in self._pool.poll():
            assert isinstance(answer.key, tuple)
            id, index = answer.key
            verdicts = self._verdicts[id]
            is_failed = answer.failure is not None
            verdicts[index] = Rejection(self._slow_check, answer.failure or "") if is_failed else answer.value
            result = self._results[id]
            if len(verdicts) == len(result.completions):
                del self._results[id], self._verdicts[id]
                checked.append(CheckedResult(result, tuple(verdicts[number] for number in range(len(verdicts)))))
        return checked

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


def _drop_candidates(completion: Completion) -> Completion:
    """Return a completion with token ids alone of its log-probabilities: checks need no others."""
    if completion.logprobs is None:
        return completion
    return replace(completion, token_ids=completion.logprobs.token_ids.tolist(), logprobs=None)


def start_completion_checker(
    config: CheckConfig, rows: InputRows, log: Callable[[str], None]
) -> CompletionChecker | None:
    """Start the workers that a configuration asks for; None if it asks for no checks.

    Args:
        log: takes each line that the workers print.
    """
    if not config.is_used:
        return None
    environment = select_own_environment(os.environ)
    environment["CUDA_VISIBLE_DEVICES"] = ""  # checks must not take memory from the engine
    places = [path for path in (*sys.path, os.getcwd()) if path]  # a function may be in the working directory
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(places))
    workers = WorkerSpec(
        "the check",
        "dpgen.engine.checking.checks:start",
        (config,),
        environment,
        num_workers=config.num_workers,
        timeout_s=config.timeout_s,
    )
    slow_check = "function" if config.function is not None else "regex" if config.regex is not None else "json_schema"
    needed_rows = rows if config.function is not None else None
    return CompletionChecker(WorkerPool(workers, log), needed_rows, slow_check)
