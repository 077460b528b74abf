"""Tests of `dpgen.data.openai_batch.lines`: each line is a request or a typed error, whatever it holds."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import pytest

from dpgen.data.openai_batch.lines import BAD_REQUEST, INVALID_TEXT, UNSUPPORTED_REQUEST, parse_batch_line


def make_line(**changes: Any) -> str:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
    return json.dumps({key: value for key, value in {**line, **changes}.items() if value is not ...})


GOOD = make_line()


def test_a_line_is_parsed_into_its_parts() -> None:
    line = parse_batch_line(make_line(body={"model": "m", "temperature": 0.5}))
    assert (line.custom_id, line.url, line.error) == ("a", "/v1/chat/completions", None)
    assert line.body == {"model": "m", "temperature": 0.5}


@pytest.mark.parametrize("text", [GOOD.encode(), f"{GOOD}\r\n", f"  {GOOD} ", make_line(method="post")])
def test_bytes_line_ends_and_blanks_make_no_difference(text: str | bytes) -> None:
    assert parse_batch_line(text) == parse_batch_line(GOOD)


def test_other_keys_of_a_line_are_ignored() -> None:
    assert parse_batch_line(make_line(metadata={"a": 1})).error is None


DEEP = "[" * 300 + "]" * 300
BAD_LINES: dict[str, tuple[str | bytes, str | None, str, str]] = {
    "blank": ("", None, BAD_REQUEST, "no JSON"),
    "no JSON": ("hello", None, BAD_REQUEST, "no JSON"),
    "cut short": (GOOD[:-4], "a", BAD_REQUEST, "no JSON"),
    "two objects": (GOOD + GOOD, "a", BAD_REQUEST, "no JSON"),
    "the id comes last": (
        '{"body": {"custom_id": "no", "x": [,]}, "custom_id": "a\\u00e9"}',
        "aé",
        BAD_REQUEST,
        "no JSON",
    ),
    "a list": ("[1, 2]", None, BAD_REQUEST, "a list, not an object"),
    "a number": ("17", None, BAD_REQUEST, "an int, not an object"),
    "null": ("null", None, BAD_REQUEST, "null, not an object"),
    "no custom_id": (make_line(custom_id=...), None, BAD_REQUEST, "no 'custom_id'"),
    "no method": (make_line(method=...), "a", BAD_REQUEST, "no 'method'"),
    "no url": (make_line(url=...), "a", BAD_REQUEST, "no 'url'"),
    "no body": (make_line(body=...), "a", BAD_REQUEST, "no 'body'"),
    "key twice": (GOOD[:-1] + ', "url": "/v1/completions"}', "a", BAD_REQUEST, "more than one 'url'"),
    "id is a number": (make_line(custom_id=7), None, BAD_REQUEST, "'custom_id' is an int, not a string"),
    "method is a number": (make_line(method=7), "a", BAD_REQUEST, "'method' is an int, not a string"),
    "wrong method": (make_line(method="GET"), "a", BAD_REQUEST, "'method' is 'GET', not 'POST'"),
    "url is null": (make_line(url=None), "a", BAD_REQUEST, "'url' is null, not a string"),
    "wrong url": (make_line(url="/v2/chat" * 99), "a", BAD_REQUEST, "expected /v1/chat/completions"),
    "moderations": (make_line(url="/v1/moderations"), "a", UNSUPPORTED_REQUEST, "not supported yet"),
    "body is a list": (make_line(body=[]), "a", BAD_REQUEST, "'body' is a list, not an object"),
    "body is a text": (make_line(body="{}"), "a", BAD_REQUEST, "'body' is a str, not an object"),
    "too deep": (make_line(body={}).replace("{}", f'{{"x": {DEEP}}}'), "a", BAD_REQUEST, "deeper than 200 levels"),
    "very deep": ('{"custom_id": "a", "body": ' + "[" * 10**6, "a", BAD_REQUEST, "deeper than 200 levels"),
    "NaN": (make_line(body={"x": float("nan")}), "a", BAD_REQUEST, "NaN is no JSON value"),
    "infinity": (make_line(body={"x": float("-inf")}), "a", BAD_REQUEST, "-Infinity is no JSON value"),
    "huge float": (GOOD.replace("[]", "1e999"), "a", BAD_REQUEST, "1e999' is too large"),
    "huge int": (GOOD.replace("[]", "9" * 5000), "a", BAD_REQUEST, "no JSON: Exceeds the limit"),
    "lone surrogate": (make_line(body={"x": "\ud800"}), "a", INVALID_TEXT, "lone surrogate"),
    "lone surrogate in a key": (make_line(body={"\udfff": 1}), "a", INVALID_TEXT, "lone surrogate"),
    "lone surrogate in the id": (make_line(custom_id="\ud800"), None, INVALID_TEXT, "lone surrogate"),
    "not UTF-8": (GOOD.encode().replace(b"[]", b'"\xff"'), "a", INVALID_TEXT, "not valid Unicode"),
    "control character": (GOOD.replace("[]", '"\x00"'), "a", BAD_REQUEST, "no JSON: Invalid control character"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_a_typed_error_and_keeps_its_id(name: str) -> None:
    text, custom_id, error_type, message = BAD_LINES[name]
    line = parse_batch_line(text)
    assert line.error is not None and line.body is None
    assert (line.custom_id, line.error.type) == (custom_id, error_type)
    assert message in line.error.message and len(line.error.message) < 300


def test_a_pair_of_surrogates_is_a_character() -> None:
    line = parse_batch_line(make_line(body={"x": "🙂"}))
    assert line.error is None and line.body == {"x": "🙂"}


def test_nesting_is_judged_alike_on_any_stack() -> None:
    nested = make_line(body={}).replace("{}", '{"x": %s}' % ("[" * 198 + "]" * 198))
    answers = [parse_batch_line(nested).error]

    def descend(depth: int) -> None:
        if depth:
            descend(depth - 1)
        else:
            answers.append(parse_batch_line(nested).error)

    thread = threading.Thread(target=descend, args=(500,))
    thread.start()
    thread.join()
    assert answers == [None, None]


def test_no_mutilated_line_raises() -> None:
    dice = random.Random(7)
    good = make_line(body={"messages": [{"role": "user", "content": "é\\🙂"}], "x": [1.5, None, True, "\\ud83d"]})
    for _ in range(3000):
        chars = list(good)
        for _ in range(dice.randrange(1, 5)):
            index = dice.randrange(len(chars))
            chars[index : index + dice.randrange(3)] = dice.choice(['"', "\\", "{", "}", "[", "\\u", "\ud800", "0", ""])
        line = parse_batch_line("".join(chars))
        assert (line.body is None) == (line.error is not None)
