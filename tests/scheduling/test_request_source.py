"""Test what of a row becomes its request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpgen.errors import RowRefused
from dpgen.scheduling.request_builder import RequestBuilder


def build_sampling(value: Any) -> dict[str, Any]:
    builder = RequestBuilder(lambda columns: ([1], None), None, {"field": "column"}, [{"field": "of the entry"}])
    return builder.build(0, {"column": value}).sampling


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({"20": 100.0, "21": None}, {"20": 100.0}),
        ({"choice": ["9", "8"], "regex": None, "json": None}, {"choice": ["9", "8"]}),
        (
            {"json": {"properties": {"a": {"type": "integer"}, "b": None}, "required": ["a", None]}, "regex": None},
            {"json": {"properties": {"a": {"type": "integer"}}, "required": ["a", None]}},
        ),
        ([{"a": 1, "b": None}], [{"a": 1}]),
        (json.dumps({"a": None}), '{"a": null}'),
        ({}, {}),
        ([], []),
        (0, 0),
        (False, False),
    ],
)
def test_nulls_that_arrow_added_to_a_nested_sampling_value_are_dropped(value: Any, kept: Any) -> None:
    assert build_sampling(value) == {"field": kept}


@pytest.mark.parametrize("value", [None, {"choice": None, "regex": None}, {"json": {"a": None}, "regex": None}])
def test_a_value_without_anything_keeps_that_of_the_run(value: Any) -> None:
    kept = {"json": {}} if value and "json" in value else "of the entry"
    assert build_sampling(value) == {"field": kept}


def test_a_value_that_is_nested_too_deep_is_an_error_of_its_row() -> None:
    value: Any = {}
    for _ in range(100_000):
        value = {"a": value}
    with pytest.raises(RowRefused, match="nested too deep") as raised:
        build_sampling(value)
    assert raised.value.type == "bad_sampling"
