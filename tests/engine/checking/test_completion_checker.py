"""The rank's half of checks: what it does itself, what it sends, and how often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest

from dpgen.config.completion_checks import CheckConfig
from dpgen.config.sections import OutputConfig
from dpgen.engine.checking import completion_checker
from dpgen.engine.checking.checks import CheckAnswer, CheckTask, checks_parse_json, start
from dpgen.engine.checking.completion_checker import CheckedResult, CompletionChecker, start_completion_checker
from dpgen.engine.checking.row_cache import RowCache
from dpgen.engine.parsing.completion_parser import start_completion_parser
from dpgen.journal.attempts import Rejection
from dpgen.records import Completion, RowResult
from dpgen.workers.pool import Answer


class Rows:
    """Rows whose reads are counted."""

    columns = ("prompt",)

    def __init__(self, mean_row_bytes: float = 100.0) -> None:
        self.mean_row_bytes = mean_row_bytes
        self.reads: list[list[int]] = []

    def iter_rows(self, row_ids: np.ndarray, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        self.reads.append(row_ids.tolist())
        return ({"prompt": f"p{row}"} for row in row_ids.tolist())


class Pool:
    """A pool whose workers answer when they are told to."""

    def __init__(self) -> None:
        self.tasks: dict[Any, CheckTask] = {}
        self.answers: list[Answer] = []

    def submit(self, key: Any, task: CheckTask) -> None:
        self.tasks[key] = task

    def poll(self) -> list[Answer]:
        answers, self.answers = self.answers, []
        return answers


def make_result(row: int, *texts: str, **fields: Any) -> RowResult:
    return RowResult(row, completions=tuple(Completion(text, "stop", 1) for text in texts), **fields)


def test_checks_that_only_look_start_no_worker_and_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion_checker, "WorkerPool", None)
    rows: Any = Rows()
    for config in (CheckConfig(non_empty=True, finish_reason=["stop"]), CheckConfig(continue_truncated=True)):
        checker = start_completion_checker(config, OutputConfig(), rows, print)
        assert checker is not None
        checker.wait_until_ready(lambda: None)
        checker.submit(make_result(3, "a", " "))
        assert len(checker) == 1
        [checked] = checker.poll()
        why = Rejection("non_empty", "the text is empty") if config.non_empty else None
        assert checked == CheckedResult(make_result(3, "a", " "), (None, why))
        assert len(checker) == 0 and checker.poll() == []
        checker.close()
    assert rows.reads == []


def test_workers_get_only_what_they_must_check() -> None:
    pool: Any = Pool()
    checker = CompletionChecker(CheckConfig(non_empty=True, regex="a"), pool)
    checker.submit(make_result(1, "", "text"))
    checker.submit(make_result(2, ""))
    assert [checked.result.row for checked in checker.poll()] == [2], "the rank itself rejects it"
    [(key, task)] = pool.tasks.items()
    assert task == CheckTask("text"), "a regular expression needs neither the row nor anything else"
    pool.answers.append(Answer(key, failure="the check process died (exit status 3)"))
    [checked] = checker.poll()
    assert list(map(str, checked.rejections)) == [
        "non_empty: the text is empty",
        "regex: the check process died (exit status 3)",
    ]


def test_workers_that_check_also_parse_so_that_each_text_goes_to_one_worker_once() -> None:
    tools: Any = None
    assert start_completion_parser(OutputConfig(parse="json"), CheckConfig(regex="a"), None, tools, print) is None
    pool: Any = Pool()
    checker = CompletionChecker(CheckConfig(regex="[a1]"), pool)
    checker.submit(make_result(1, "[1, 1]", "a", "[2]"))
    assert checker.poll() == []
    handle, _ = start(CheckConfig(regex="[a1]"), parses_json=True)
    pool.answers = [Answer(key, handle(task)) for key, task in pool.tasks.items()]
    [checked] = checker.poll()
    assert [completion.parsed for completion in checked.result.completions] == ["[1,1]", None, "[2]"]
    error = "no JSON: Expecting value at character 0 of 1"
    assert [completion.parse_error for completion in checked.result.completions] == [None, error, None]
    assert checked.rejections == (None, None, Rejection("regex", "it is found nowhere"))


@pytest.mark.parametrize(
    ("check", "output", "is_one"),
    [
        (CheckConfig(regex="a"), OutputConfig(parse="json"), True),
        (CheckConfig(function="m:f"), OutputConfig(schema={"type": "object"}), True),
        (CheckConfig(non_empty=True), OutputConfig(parse="json"), False),  # no worker checks
        (CheckConfig(regex="a"), OutputConfig(parse="json", tool_parser="hermes"), False),  # vLLM's parser comes first
        (CheckConfig(regex="a"), OutputConfig(parse="json", reasoning="split"), False),
        (CheckConfig(regex="a"), OutputConfig(), False),
    ],
)
def test_checks_parse_only_what_needs_no_parser_of_vllm(check: CheckConfig, output: OutputConfig, is_one: bool) -> None:
    assert checks_parse_json(check, output) is is_one


def test_rows_of_many_results_are_read_at_once_and_each_goes_with_its_own() -> None:
    pool: Any = Pool()
    rows: Any = Rows()
    checker = CompletionChecker(CheckConfig(function="m:f"), pool, rows)
    checker.submit(make_result(7, "a", "b"))
    checker.submit(make_result(5, "c", attempt=3), first_attempt=1)
    checker.submit(make_result(7, "d", sample=1, attempt=1))
    assert checker.poll() == [] and checker.poll() == []
    assert rows.reads == [[7, 5]]
    given = {task.text: task.for_function for task in pool.tasks.values()}
    places = {text: (given.columns, given.sample, given.attempt) for text, given in given.items() if given}
    assert places == {
        "a": ({"prompt": "p7"}, 0, 0),
        "b": ({"prompt": "p7"}, 1, 0),
        "c": ({"prompt": "p5"}, 0, 2),
        "d": ({"prompt": "p7"}, 1, 1),
    }
    pool.answers += [
        Answer(key, CheckAnswer(None if task.text != "b" else Rejection("function", "no")))
        for key, task in pool.tasks.items()
    ]
    assert {(checked.result.id, checked.rejections) for checked in checker.poll()} == {
        (make_result(7).id, (None, Rejection("function", "no"))),
        (make_result(5, attempt=3).id, (None,)),
        (make_result(7, sample=1, attempt=1).id, (None,)),
    }


def test_rows_of_requests_in_flight_are_read_with_the_first_that_is_checked_and_again_only_if_long_gone() -> None:
    pool: Any = Pool()
    rows: Any = Rows()
    checker = CompletionChecker(CheckConfig(function="m:f"), pool, rows)
    for row in range(100):
        checker.expect(row)
    for row in (3, 0, 3, 63):  # a further attempt, too
        checker.submit(make_result(row, "a", attempt=len(pool.tasks)))
        checker.poll()
    assert rows.reads == [[3, *range(3), *range(4, 64)]]
    for row in range(100, 400):
        checker.expect(row)
    checker.submit(make_result(64, "a"))
    checker.poll()
    assert rows.reads[1:] == [list(range(64, 128))]


def test_large_rows_are_not_read_before_they_are_checked() -> None:
    cache = RowCache(cast(Any, Rows(mean_row_bytes=3e5)))
    for row in range(9):
        cache.expect(row)
    assert cache.read([5]) == [{"prompt": "p5"}]
    assert cast(Any, cache)._rows.reads == [[5, 0, 1]]
    for row in range(20, 40):  # no more than a few are kept
        assert cache.read([row]) == [{"prompt": f"p{row}"}]
    assert len(cache) <= 12
