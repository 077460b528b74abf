"""Parse one line of an OpenAI batch file: {custom_id, method, url, body}.

- `parse_batch_line` never raises. The same text gives the same answer everywhere, whatever the depth of the stack.
- A custom_id is kept where it can be read, also of a line that is no valid JSON.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from dpgen.formatting import describe_type

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
EMBEDDINGS_URL = "/v1/embeddings"
URLS = (CHAT_URL, COMPLETIONS_URL, EMBEDDINGS_URL)
LINE_KEYS = ("custom_id", "method", "url", "body")
CUSTOM_ID_COLUMN = "custom_id"  # that a batch file is read as, beside REQUEST_COLUMN
FORMAT = "openai_batch"  # of `data.format`, and the kind of such files for their reader

BAD_REQUEST = "bad_request"  # the line or its body is not what the API takes
UNSUPPORTED_REQUEST = "unsupported_request"  # the API takes it, and dpgen does not yet
UNKNOWN_MODEL = "unknown_model"  # body.model is neither the model nor an adapter
INVALID_TEXT = "invalid_text"  # a text is not Unicode

_OTHER_URLS = ("/v1/responses", "/v1/moderations", "/v1/audio/", "/v1/score", "/v1/rerank")
_MAX_DEPTH = 200  # of nested objects and lists; vLLM's JSON parser has the same limit
_MAX_SHOWN_CHARS = 80
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_COLON = re.compile(r"\s*:\s*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class BatchError:
    """Say why a line can't be answered.

    Attributes:
        type: a stable snake_case word, one of the four above.
        message: the reason, for a person.
    """

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class BatchLine:
    """Hold a line of a batch file.

    Attributes:
        custom_id: the line's name; None where it can't be read.
        url: one of URLS; None where `error` is set and the URL is not one that dpgen answers.
        body: the request, not checked; None if `error` is set.
        error: why the line can't be answered; None if its form is right.
    """

    custom_id: str | None
    url: str | None
    body: dict[str, Any] | None
    error: BatchError | None = None


def parse_batch_line(text: str | bytes) -> BatchLine:
    """Return what a line holds; never raises.

    Args:
        text: the line, with or without its end. Bytes that are not UTF-8 may stand in a text as `surrogateescape`
            makes them.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    text = text.strip()
    try:
        pairs, value = _parse_json(text)
    except ValueError as reason:
        return BatchLine(_find_custom_id(text), None, None, BatchError(BAD_REQUEST, str(reason)))
    if not isinstance(value, dict):
        return BatchLine(
            None, None, None, BatchError(BAD_REQUEST, f"the line is {describe_type(value)}, not an object")
        )
    custom_id, url = _get_text(value, "custom_id"), _get_text(value, "url")
    url = url if url in URLS else None
    error = _find_error(text, pairs, value)
    return BatchLine(custom_id, url, None if error else value["body"], error)


def _parse_json(text: str) -> tuple[list[tuple[str, Any]], Any]:
    """Return the outermost object's keys and values, each as often as it is there, and the value of the whole text.

    Raises:
        ValueError: the text is no JSON, or nested too deep.
    """
    if text.count("[") + text.count("{") > _MAX_DEPTH and _find_depth(text) > _MAX_DEPTH:
        raise ValueError(f"the line is nested deeper than {_MAX_DEPTH} levels")
    outermost: list[tuple[str, Any]] = []

    def keep_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal outermost
        outermost = pairs  # the outermost object is the last one to end
        return dict(pairs)

    try:
        value = json.loads(
            text, object_pairs_hook=keep_pairs, parse_constant=_reject_constant, parse_float=_parse_float
        )
    except json.JSONDecodeError as error:
        is_at_end = error.pos >= len(text)
        place = "at its end" if is_at_end else f"at character {error.pos + 1:,} of {len(text):,}"
        raise ValueError(f"the line is no JSON: {error.msg} {place}") from None
    except ValueError as error:
        raise ValueError(f"the line is no JSON: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise ValueError("the line is nested too deep") from None
    return outermost, value


def _find_error(text: str, pairs: list[tuple[str, Any]], value: dict[str, Any]) -> BatchError | None:
    """Return what is wrong with an object of a batch file; None if nothing is."""
    if not text.isascii() or _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            return BatchError(INVALID_TEXT, "the line holds text that is not valid Unicode (a lone surrogate)")
    names = [name for name, _ in pairs]
    for key in LINE_KEYS:
        if names.count(key) != 1:
            return BatchError(BAD_REQUEST, f"the line has {'no' if key not in value else 'more than one'} {key!r}")
    for key in ("custom_id", "method", "url"):
        if not isinstance(value[key], str):
            return BatchError(BAD_REQUEST, f"{key!r} is {describe_type(value[key])}, not a string")
    if value["method"].upper() != "POST":
        return BatchError(BAD_REQUEST, f"'method' is {_shorten(value['method'])}, not 'POST'")
    url = value["url"]
    if url not in URLS:
        expected = f"expected {', '.join(URLS[:-1])} or {URLS[-1]}"
        if url.startswith(_OTHER_URLS):
            return BatchError(UNSUPPORTED_REQUEST, f"'url' {_shorten(url)} is not supported yet; {expected}")
        return BatchError(BAD_REQUEST, f"'url' is {_shorten(url)}; {expected}")
    if not isinstance(value["body"], dict):
        return BatchError(BAD_REQUEST, f"'body' is {describe_type(value['body'])}, not an object")
    return None


def _find_custom_id(text: str) -> str | None:
    """Return the custom_id of a text that is no JSON: that of its outermost object, as far as it can be read."""
    depth = 0
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in "{[":
            depth += 1
        elif mark in "}]":
            depth -= 1
        elif depth == 1 and mark == '"custom_id"' and (colon := _COLON.match(text, token.end())):
            try:
                value = json.JSONDecoder().raw_decode(text, colon.end())[0]
            except (ValueError, RecursionError):
                return None
            return _get_text({"custom_id": value}, "custom_id")
    return None


def _find_depth(text: str) -> int:
    """Return how deep objects and lists are nested in a text."""
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in "}]":
            depth -= 1
    return deepest


def _get_text(value: dict[str, Any], key: str) -> str | None:
    """Return the text under a key; None if there is none, or if it is not valid Unicode."""
    text = value.get(key)
    if not isinstance(text, str):
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {_shorten(text)} is too large")
    return number


def _shorten(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "...")
