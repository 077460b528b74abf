"""Tools are read in each form that people store them in."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from dpgen.config.tools import parse_tools

BARE = {"name": "sum", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "default": None}}}}
OPENAI = {"type": "function", "function": BARE}


@pytest.mark.parametrize(
    "value",
    [
        [OPENAI],
        [BARE],
        [{"function": BARE}],
        [{"type": "function", **BARE}],
        OPENAI,
        BARE,
        json.dumps([OPENAI]),
        json.dumps(BARE),
        [json.dumps(OPENAI)],
        (BARE,),
    ],
)
def test_every_form_of_a_tool_becomes_openais(value: Any) -> None:
    assert parse_tools(value) == [OPENAI]


def test_a_tool_in_openais_form_keeps_its_further_keys_and_their_order() -> None:
    tool = {"function": {"strict": True, "name": "f"}, "type": "function", "cache": 1}
    assert json.dumps(parse_tools([tool])) == json.dumps([{**tool}])
    assert parse_tools([]) == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "tools are an int, not a list of functions"),
        (None, "tools are null, not a list of functions"),
        ("[{", "the text is not valid JSON: "),
        ("sum", "the text is not valid JSON: "),
        ("3", "tools are an int"),
        ("[" * 100_000, "the JSON text is nested too deep"),
        ([None], "tool 0 is null, not a function with a name"),
        ([BARE, "sum"], "tool 1: the text is not valid JSON"),
        ([BARE, 3], "tool 1 is an int"),
        ([{}], "tool 0 has no 'name' that is a text; its keys: none"),
        ([{"name": ""}], "tool 0 has no 'name' that is a text; its keys: name"),
        ([{"name": 3, "description": "x"}], "its keys: name, description"),
        ([{"type": "web_search"}], "tool 0 has the type 'web_search'; only functions can be given"),
        ([{"type": "function", "function": "sum"}], "tool 0: 'function' is a str, not an object"),
        ([{"name": "f", "parameters": "none"}], "tool 0: 'parameters' is a str, not an object"),
    ],
)
def test_what_is_no_tool_is_refused_with_the_place(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        parse_tools(value)
    assert "\n" not in str(raised.value)
