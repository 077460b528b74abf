"""Read the JSON value that a completion holds, as a program would that has to work with it."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

# The whole text in one fence, as chat models like to write JSON: ```json ... ```
_FENCE = re.compile(r"\s*```[A-Za-z0-9_-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


class JsonText(NamedTuple):
    """Hold the JSON value of a text.

    Attributes:
        value: as `json.loads` returns it; None where there is an error.
        canonical: the value as JSON text, without blanks, with characters rather than escapes; None likewise.
        error: why the text is no JSON; None where it is.
    """

    value: Any
    canonical: str | None
    error: str | None = None


def read_json(text: str) -> JsonText:
    """Return the JSON value of a text, or why there is none.

    The text is the value and nothing else; one Markdown fence around all of it is taken off. NaN, an infinity and half
    of a surrogate pair are no JSON.
    """
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_reject, parse_float=_parse_float)
        canonical = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        canonical.encode("utf-8")  # half of a surrogate pair, as an escape
    except (ValueError, RecursionError) as error:
        return JsonText(None, None, f"no JSON: {_describe_error(error, text)}")
    return JsonText(value, canonical)


def _describe_error(error: Exception, text: str) -> str:
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
