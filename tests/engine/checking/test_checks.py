"""What each check rejects, with which reason, and what a user's function gets and may return."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dpgen.config.completion_checks import CheckConfig
from dpgen.engine.checking.checks import CheckTask, FunctionInput, compute_repetition, make_quick_check, start
from dpgen.records import Completion, ToolCall

SCHEMA = {
    "type": "object",
    "required": ["age"],
    "properties": {"age": {"$ref": "#/$defs/age"}},
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


def check(config: CheckConfig, text: str = "text", row: dict[str, Any] | None = None, **fields: Any) -> str | None:
    """Return a check's verdict as users read it; None for one that passes."""
    completion = Completion(text, fields.pop("finish_reason", "stop"), 3, **fields)
    rejection = make_quick_check(config)(completion)
    if rejection is None:
        handle, _ = start(config)
        calls, ids = completion.tool_calls, completion.token_ids
        given = FunctionInput(row or {}, completion.finish_reason, 3, completion.reasoning, calls, ids, 1, 2)
        rejection = handle(CheckTask(text, completion.parsed, given)).rejection
    return None if rejection is None else str(rejection)


@pytest.mark.parametrize(
    ("config", "text", "verdict"),
    [
        (CheckConfig(non_empty=True), "x", None),
        (CheckConfig(non_empty=True), " \n", "non_empty: the text is empty"),
        (CheckConfig(regex="^A: "), "A: 4", None),
        (CheckConfig(regex="^A: "), "B: 4", "regex: it is found nowhere"),
        (CheckConfig(max_repetition=0.5), "a b c d e f g h", None),
        (CheckConfig(max_repetition=0.5), "no yes " * 50, "max_repetition: 98 % of its 4-grams repeat earlier ones"),
        (CheckConfig(max_repetition=0.5), "好的" * 50, "max_repetition: 98 % of its 4-grams repeat earlier ones"),
        (CheckConfig(max_repetition=0.0), "four words only here", None),
        (CheckConfig(json_schema=SCHEMA), '```json\n{"age": 3}\n```', None),
        (CheckConfig(json_schema=SCHEMA), '{"age": -3}', "json_schema: at $.age: -3 is less than the minimum of 0"),
        (CheckConfig(json_schema=SCHEMA), "[]", "json_schema: at $: [] is not of type 'object'"),
        (CheckConfig(json_schema=SCHEMA), "hm", "json_schema: no JSON: Expecting value at character 0 of 2"),
        (CheckConfig(json_schema=SCHEMA), "", "json_schema: no JSON: the text is empty"),
        (CheckConfig(json_schema=False), "1", "json_schema: at $: False schema does not allow 1"),
        (CheckConfig(non_empty=True, regex="^A"), "", "non_empty: the text is empty"),
    ],
)
def test_a_check_passes_what_it_should_and_says_why_it_rejects(
    config: CheckConfig, text: str, verdict: str | None
) -> None:
    assert check(config, text) == verdict


def test_a_completion_that_calls_a_tool_is_not_empty() -> None:
    assert check(CheckConfig(non_empty=True), "", tool_calls=(ToolCall("1", "f", "{}"),)) is None


def test_only_the_finish_reasons_that_are_named_pass() -> None:
    config = CheckConfig(finish_reason=["stop", "repetition"])
    assert check(config) is None
    assert check(config, finish_reason="length") == "finish_reason: it ended by length, not by stop or repetition"


def test_a_short_text_does_not_repeat_itself() -> None:
    assert compute_repetition("") == compute_repetition("a a a") == 0.0
    assert compute_repetition("a a a a a") == 0.5


FUNCTIONS = """
import numpy

def see(row, completion):
    return f"{row} {completion.text} {completion.finish_reason} {completion.num_tokens} {completion.parsed} " \\
        f"{completion.token_ids} {completion.sample} {completion.attempt}"

def give(row, completion):
    return row["value"]

def numpy_says(row, completion):
    return numpy.bool_(row["value"])

def numpy_number(row, completion):
    return numpy.float64(row["value"])

def fail(row, completion):
    raise AssertionError("not 4")

class Grader:
    @staticmethod
    def grade(row, completion):
        return False

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "functions_of_a_test.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("functions_of_a_test", None)
    return "functions_of_a_test"


def test_a_function_gets_the_row_and_the_completion(module: str) -> None:
    seen = check(CheckConfig(function=f"{module}:see"), "t", {"a": 1}, parsed='{"b":2}', token_ids=[5, 6])
    assert seen == "function: {'a': 1} t stop 3 {'b': 2} [5, 6] 1 2"


def test_a_function_gets_the_json_value_where_the_same_worker_reads_it(module: str) -> None:
    handle, _ = start(CheckConfig(function=f"{module}:see", json_schema={"type": "object"}), parses_json=True)
    answer = handle(CheckTask('{"b": 2}', None, FunctionInput({}, "stop", 3)))
    assert (answer.parsed, answer.parse_error) == ('{"b":2}', None)
    assert str(answer.rejection) == "function: {} {\"b\": 2} stop 3 {'b': 2} None 0 0"


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("give", True, None),
        ("give", False, "function: it returned False"),
        ("give", "too long", "function: too long"),
        ("give", "", "function: it returned an empty reason"),
        ("give", None, "function: it returned NoneType, and must return True, False or a reason"),
        ("give", 1, "function: it returned int, and must return True, False or a reason"),
        ("numpy_says", True, None),
        ("numpy_says", False, "function: it returned False"),
        ("numpy_number", 0.3, "function: it returned float64, and must return True, False or a reason"),
        ("fail", None, "function: it raised AssertionError: not 4"),
        ("Grader.grade", None, "function: it returned False"),
    ],
)
def test_what_a_function_returns_or_raises_is_its_verdict(
    module: str, name: str, value: Any, verdict: str | None
) -> None:
    assert check(CheckConfig(function=f"{module}:{name}"), row={"value": value}) == verdict


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"function": "no_such_module:f"}, "no_such_module can't be imported: ModuleNotFoundError"),
        ({"function": "functions_of_a_test:gave"}, "has no 'gave'; did you mean 'give'?"),
        ({"function": "functions_of_a_test:number"}, "is a int, and no function"),
        ({"json_schema": {"type": "objekt"}}, "check.json_schema is no JSON Schema, at $.type: 'objekt'"),
        (
            {"json_schema": {"items": {"$ref": "https://example.org/x.json"}}},
            "check.json_schema refers to https://example.org/x.json: put that schema under $defs",
        ),
    ],
)
def test_a_check_that_can_not_be_made_is_refused(module: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        start(CheckConfig(**fields))
    assert message in str(raised.value)
