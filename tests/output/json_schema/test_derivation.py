"""A JSON Schema gives a column its types; what has no type stays JSON text, with the reason."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from dpgen.output.json_schema.derivation import derive_type
from dpgen.output.json_schema.value_types import read_value

NODE = {
    "$defs": {"Node": {"properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}}}},
    "$ref": "#/$defs/Node",
}
DOUBLING = {f"d{i}": {"properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"}} for i in range(20)}


def make_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "type"),
    [
        ({"type": "string", "pattern": "a+", "format": "date"}, pa.string()),
        ({"type": "integer", "minimum": -5}, pa.int64()),
        ({"type": "number"}, pa.float64()),
        ({"type": "boolean"}, pa.bool_()),
        ({"type": ["string", "null"]}, pa.string()),
        ({"type": ["integer", "number"]}, pa.float64()),
        ({"enum": ["a", "b", None]}, pa.string()),
        ({"enum": [1, 2.5]}, pa.float64()),
        ({"const": True}, pa.bool_()),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}, pa.int64()),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, pa.float64()),
        ({"anyOf": [{"const": "a"}, {"type": "string"}]}, pa.string()),
        ({"allOf": [{"type": "string"}], "description": "x"}, pa.string()),
        ({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}, pa.list_(pa.list_(pa.float64()))),
        (make_object(a={"type": "string"}, b=make_object(c={"type": "integer"})), None),
        ({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"enum": ["x"]}}}, None),
    ],
)
def test_what_arrow_can_hold_gets_its_type(schema: dict[str, Any], type: pa.DataType | None) -> None:
    derived = derive_type(schema)
    assert derived.text_parts == () and derived.describe_text_parts() == ""
    assert derived.value_type is not None
    arrow = derived.value_type.to_arrow()
    assert pa.types.is_struct(arrow) if type is None else arrow == type


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({}, "any value is allowed"),
        ({"type": "object"}, "it declares no properties"),
        (make_object(), "it declares no properties"),
        ({**make_object(a={}), "additionalProperties": True}, "additionalProperties"),
        ({**make_object(a={}), "additionalProperties": {"type": "string"}}, "additionalProperties"),
        ({**make_object(a={}), "patternProperties": {"^x": {}}}, "patternProperties"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "it may have several types"),
        ({"type": ["string", "integer"]}, "it may have several types"),
        ({"enum": ["a", 1]}, "its values have several types"),
        ({"enum": [[1]]}, "its values are no texts or numbers"),
        ({"type": "null"}, "only null is allowed"),
        ({"type": "array", "prefixItems": [{"type": "string"}]}, "each item has a type of its own"),
        ({"type": "integer", "maximum": 2**63}, "integers beyond 64 bits are allowed"),
        ({"$ref": "#"}, "it refers to itself"),
        ({"$ref": "https://example.org/schema"}, "$ref to 'https://example.org/schema'"),
        ({"$ref": "#/$defs/none"}, "$ref to '#/$defs/none'"),
        ({"allOf": [{"type": "string"}, {"minLength": 3}]}, "allOf"),
        ({"anyOf": [{"type": "string"}], "type": "string"}, "anyOf beside type"),
        ({"type": "decimal"}, "type 'decimal'"),
        ({"minLength": 3}, "it has no type"),
        ({"$ref": "#/$defs/d0", "$defs": DOUBLING | {"d20": {"type": "string"}}}, "more than 1,000 parts"),
    ],
)
def test_what_has_no_type_stays_json_text(schema: dict[str, Any], reason: str) -> None:
    derived = derive_type(schema)
    assert derived.value_type is None
    sentence = derived.describe_text_parts()
    assert sentence.startswith("output.schema: the column parsed is JSON text: ") and reason in sentence


def test_only_the_part_without_a_type_is_json_text() -> None:
    derived = derive_type(make_object(a={"type": "string"}, meta={"type": "object"}, list={"type": "array"}))
    assert derived.describe_text_parts() == (
        "output.schema: the column parsed has JSON text in $.meta (it declares no properties), "
        "$.list[] (any value is allowed)"
    )
    assert derived.value_type is not None
    text = '{"a": "x", "meta": {"k": [1, "é"]}, "list": [null, {"b": 1}]}'
    value, misfit = read_value(text, derived.value_type)
    assert misfit is None
    assert value == {"a": "x", "meta": '{"k":[1,"é"]}', "list": ["null", '{"b":1}']}, "texts hold the JSON values"


def test_a_schema_that_refers_to_itself_is_json_text_from_there_on() -> None:
    derived = derive_type(NODE)
    assert derived.text_parts == (("$.next", "it refers to itself"),)
    assert derived.value_type is not None
    text = '{"value": 1, "next": {"value": 2, "next": {}}}'
    assert read_value(text, derived.value_type)[0] == {"value": 1, "next": '{"value":2,"next":{}}'}


def test_a_deep_schema_costs_no_crash() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    [(path, reason)] = derive_type(schema).text_parts
    assert reason == "nested too deep" and path.count("[") < 100


PERSON = {
    **make_object(
        name={"type": "string"},
        age={"type": "integer"},
        height={"type": "number"},
        tags={"type": "array", "items": {"type": "string"}},
        nick={"type": ["string", "null"]},
    ),
    "required": ["name", "tags"],
}


@pytest.mark.parametrize(
    ("value", "fitted"),
    [
        ({"name": "a", "tags": []}, {"age": None, "height": None, "nick": None}),
        ({"name": "a", "tags": ["x"], "age": 3.0, "height": 2, "nick": None}, {"age": 3, "height": 2.0, "nick": None}),
        ({"name": "a", "tags": [], "age": 2**63 - 1, "height": 10**22}, {"age": 2**63 - 1, "height": 1e22}),
    ],
)
def test_a_value_that_fits_is_kept_whole(value: Any, fitted: dict[str, Any]) -> None:
    derived = derive_type(PERSON).value_type
    assert derived is not None
    read, misfit = read_value(json.dumps(value), derived)
    assert misfit is None and read.items() >= fitted.items()
    assert pa.array([read, None], derived.to_arrow()).to_pylist() == [read, None]


@pytest.mark.parametrize(
    ("value", "misfit"),
    [
        ([], "$ is a list, not an object"),
        (None, "$ is null, not an object"),
        ({"name": "a"}, "$ lacks the required property 'tags'"),
        ({"name": "a", "tags": [], "size": 1}, "$ has the property 'size', which the schema does not declare"),
        ({"name": None, "tags": []}, "$.name is null, not a string"),
        ({"name": "a", "tags": ["x", 3]}, "$.tags[1] is an int, not a string"),
        ({"name": "a", "tags": "x"}, "$.tags is a str, not an array"),
        ({"name": "a", "tags": [], "age": "3"}, "$.age is a str, not an integer"),
        ({"name": "a", "tags": [], "age": True}, "$.age is a bool, not an integer"),
        ({"name": "a", "tags": [], "age": 2.5}, "$.age is a float, not an integer"),
        ({"name": "a", "tags": [], "age": 2**63}, "$.age is an integer beyond 64 bits"),
        ({"name": "a", "tags": [], "height": False}, "$.height is a bool, not a number"),
        ({"name": "a", "tags": [], "height": 2**53 + 1}, "$.height is an integer with more digits"),
        ({"name": "a", "tags": [], "height": 10**400}, "$.height is an integer with more digits"),
    ],
)
def test_a_value_that_does_not_fit_says_where_and_why(value: Any, misfit: str) -> None:
    derived = derive_type(PERSON).value_type
    assert derived is not None
    read, why = read_value(json.dumps(value), derived)
    assert read is None and why is not None and why.startswith(f"does not fit output.schema: {misfit}")
