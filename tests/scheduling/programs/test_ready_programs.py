"""Programs that are ready to use, given rows and options that they can't take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.program_harness import Harness

from dpgen.programs import best_of_n, pairwise_judge, tool_loop, user_simulation
from dpgen.programs.handle import Llm


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        (pairwise_judge.judge, {"question": "q", "answer_a": None, "answer_b": "b"}, "answer_a is null, not a text"),
        (pairwise_judge.judge, {"question": "q", "answer_b": "b"}, "answer_a is no column, not a text"),
        (user_simulation.converse, {"persona": None}, "persona is null, not a text"),
    ],
)
def test_a_null_column_is_not_put_into_a_prompt_as_none(
    make_harness: Callable[..., Harness], function: Callable[..., Any], columns: dict[str, Any], message: str
) -> None:
    async def program(row: dict[str, Any], llm: Llm) -> Any:
        return await function(columns, llm)

    harness = make_harness(program)
    harness.begin(0)
    [result] = harness.finish()
    assert result.error is not None and (result.error.type, result.error.message) == ("wrong_type", message)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            best_of_n.choose,
            {"column": "q", "reward": "no_such:f"},
            "program.options.reward=no_such:f: no_such ",
        ),
        (tool_loop.solve, {"column": "q", "functions": ["os.path:join", "posixpath:join"]}, "by their names alone"),
    ],
)
def test_a_wrong_option_fails_before_the_model_is_asked(
    make_harness: Callable[..., Harness], function: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    harness = make_harness(function, options=options)
    harness.begin(0)
    [result] = harness.finish()
    assert result.error is not None and result.error.type == "program_failed" and message in result.error.message
