"""Let the model use Python functions: in each step it calls one, or answers.

The model writes each step as JSON of a schema, so that any model can. Where the model was trained on tools, a program
of your own may pass `tools` to `llm.chat`, and read `tool_calls` of its answer (`output.tool_parser`).
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpgen.imports import load_function
from dpgen.programs.handle import CallFailed, Llm

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.Mod: operator.mod, ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos},
}
_ANSWER = "answer"
_MAX_EXPRESSION_CHARS = 200


async def solve(
    row: Mapping[str, Any],
    llm: Llm,
    *,
    column: str = "question",
    functions: Sequence[str] = ("dpgen.programs.tool_loop:calculate",),
    max_steps: int = 5,
    max_input_chars: int = 200,
) -> dict[str, Any]:
    """Return the answer, or null if the last step had none, and the steps.

    Args:
        column: of the question.
        functions: package.module:name of each; it gets one text. The first line of its docstring tells what it does.
        max_input_chars: of what a function gets, and of the answer.
    """
    tools = {name.rpartition(":")[2]: load_function("program.options.functions", name) for name in functions}
    if len(tools) < len(functions) or _ANSWER in tools:
        raise ValueError(f"program.options.functions: the model knows them by their names alone: {[*tools, _ANSWER]}")
    schema = {
        "type": "object",
        "properties": {
            "action": {"enum": [*tools, _ANSWER]},
            "input": {"type": "string", "maxLength": max_input_chars},
        },
        "required": ["action", "input"],
        "additionalProperties": False,
    }
    messages: list[dict[str, Any]] = [{"role": "system", "content": _describe(tools)}]
    messages.append({"role": "user", "content": row[column]})
    steps: list[dict[str, Any]] = []
    for _ in range(max_steps):
        step = await llm.json(messages, schema)
        if step["action"] == _ANSWER:
            return {"answer": step["input"], "steps": steps}
        try:
            result = str(await llm.tool(tools[step["action"]], step["input"]))
        except CallFailed as error:
            result = f"error: {error.message.partition(': ')[2]}"
        steps.append({**step, "result": result})
        messages.append({"role": "assistant", "content": json.dumps(step, ensure_ascii=False)})
        messages.append({"role": "user", "content": f"Result: {result}"})
    return {"answer": None, "steps": steps}


def _describe(tools: Mapping[str, Callable[..., Any]]) -> str:
    lines = [f"- {name}: {(function.__doc__ or '').strip().partition(chr(10))[0]}" for name, function in tools.items()]
    return "\n".join(
        [
            'Solve the task step by step. Each of your messages is one JSON object, {"action": ..., "input": ...}:',
            *lines,
            f"- {_ANSWER}: end with the answer, as input.",
        ]
    )


def calculate(expression: str) -> float:
    """Compute an expression of numbers, + - * / // % and parentheses."""
    if len(expression) > _MAX_EXPRESSION_CHARS:
        raise ValueError("the expression is too long")
    return _evaluate(ast.parse(expression.strip(), mode="eval").body)


def _evaluate(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.operand))
    raise ValueError("only numbers, + - * / // % and parentheses can be computed")
