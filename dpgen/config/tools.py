"""Read tools: the functions that a chat template shows to a model, in each form that people store them in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpgen.formatting import describe_type


def parse_tools(value: Any) -> list[dict[str, Any]]:
    """Return tools in OpenAI's form, as chat templates expect them: [{type: function, function: {name, ...}}, ...].

    Args:
        value: a list of tools or one tool. A tool is in that form, or a function alone: {name, parameters, ...}. The
            whole value, or each tool, may be JSON text.

    Raises:
        ValueError: no tools, or no JSON; the message says where.
    """
    value = parse_json_text(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"tools are {describe_type(value)}, not a list of functions")
    return [_parse_tool(f"tool {index}", tool) for index, tool in enumerate(value)]


def parse_json_text(value: Any) -> Any:
    """Return what a text says as JSON; any other value as it is.

    Raises:
        ValueError: the text is not JSON, or nested too deep.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except RecursionError:
        raise ValueError("the JSON text is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"the text is not valid JSON: {error}") from None


def _parse_tool(where: str, tool: Any) -> dict[str, Any]:
    try:
        tool = parse_json_text(tool)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(tool, Mapping):
        raise ValueError(f"{where} is {describe_type(tool)}, not a function with a name")
    if tool.get("type", "function") != "function":
        raise ValueError(f"{where} has the type {tool['type']!r}; only functions can be given")
    if "function" in tool:
        wrapped = dict(tool) if "type" in tool else {"type": "function", **tool}
    else:
        wrapped = {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}
    function = wrapped["function"]
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}: 'function' is {describe_type(function)}, not an object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where} has no 'name' that is a text; its keys: {', '.join(map(str, function)) or 'none'}")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise ValueError(f"{where}: 'parameters' is {describe_type(function['parameters'])}, not an object")
    return wrapped
