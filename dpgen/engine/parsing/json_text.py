"""Read the JSON value that a completion holds, as a program would that has to work with it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

# The whole text in one fence, as chat models like to write JSON: ```json ... ```
_FENCE = re.compile(r"\s*```[A-Za-z0-9_-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


def extract_json(text: str) -> str:
    """Return the JSON value of a text as canonical JSON text: no blanks, characters rather than escapes.

    The text is the value and nothing else; one Markdown fence around all of it is taken off.

    Raises:
        ValueError: the text is no JSON value, or holds NaN, an infinity, or half of a surrogate pair.
    """
    fenced = _FENCE.fullmatch(text)
    value = json.loads(fenced[1] if fenced else text, parse_constant=_reject, parse_float=_parse_float)
    canonical = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    canonical.encode("utf-8")  # half of a surrogate pair, as an escape
    return canonical


def describe_json_error(error: Exception, text: str) -> str:
    """Return why a text is no JSON, with the place."""
    if not text.strip():
        return "the text is empty"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos} of {len(error.doc)}"
    if isinstance(error, UnicodeEncodeError):
        return "it holds half of a surrogate pair"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return str(error)


def _reject(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond what a float holds")
    return value
