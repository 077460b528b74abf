"""The quick yes to a JSON Schema: never where jsonschema says no, and where it may be sure."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from jsonschema import SchemaError, validators
from pydantic import BaseModel, Field

from dpgen.engine.checking.quick_schema import make_quick_yes

SCALARS: list[Any] = [None, True, False, 0, 1, 2, -1, 1.0, 1.5, 2**70, "", "a", "ab", "é", "1"]
DRAFTS = ["draft-04", "draft-06", "draft-07", "2019-09", "2020-12"]
ADDRESSES = {
    "2019": "https://json-schema.org/draft/2019-09/schema",
    "2020": "https://json-schema.org/draft/2020-12/schema",
}


def draw_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if depth > 2 or kind < 0.5:
        return draw.choice(SCALARS)
    if kind < 0.75:
        return [draw_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice("abc"): draw_value(draw, depth + 1) for _ in range(draw.randrange(4))}


def draw_schema(draw: random.Random, depth: int = 0) -> Any:
    if draw.random() < 0.05:
        return draw.choice([True, False, {}])
    names = ["object", "array", "string", "boolean", "null", "integer", "number"]

    def part() -> Any:
        return draw_schema(draw, depth + 1)

    makers: dict[str, Any] = {
        "type": lambda: draw.choice([draw.choice(names), draw.sample(names, 2)]),
        "enum": lambda: draw.sample([*SCALARS, [1], {"a": 1}], 4),
        "const": lambda: draw.choice([*SCALARS, [1]]),
        "pattern": lambda: draw.choice(["a", "^a$", "[0-9]"]),
        "minLength": lambda: draw.randrange(3),
        "maxItems": lambda: draw.randrange(4),
        "minItems": lambda: draw.randrange(3),
        "minProperties": lambda: draw.randrange(3),
        "maximum": lambda: draw.choice([0, 1, 1.5]),
        "exclusiveMinimum": lambda: draw.choice([0, 1, True]),
        "required": lambda: draw.sample("abc", draw.randrange(1, 3)),
        "format": lambda: "date",
        "uniqueItems": lambda: True,
        "not": part,
        "patternProperties": lambda: {"a": part()},
    }
    if depth < 3:
        nested = {
            "items": lambda: draw.choice([part(), [part(), part()]]),
            "prefixItems": lambda: [part()],
            "properties": lambda: {name: part() for name in draw.sample("abc", 2)},
            "additionalProperties": lambda: draw.choice([False, part()]),
            "anyOf": lambda: [part(), part()],
            "allOf": lambda: [part(), part()],
            "oneOf": lambda: [part(), part()],
            "$ref": lambda: draw.choice(["#/$defs/x", "#/definitions/x", "#/$defs/y"]),
        }
        makers |= nested
        if draw.random() < 0.5:
            makers = {"type": makers["type"], **nested}
    return {name: makers[name]() for name in draw.sample(list(makers), draw.randint(1, 3))}


def follows(schema: dict[str, Any], value: Any) -> bool:
    """Return True if jsonschema says so, or rejects the schema itself."""
    validator_class = validators.validator_for(schema)
    with contextlib.suppress(Exception):
        if validator_class(schema).is_valid(value):
            return True
    with pytest.raises(SchemaError):
        validator_class.check_schema(schema)
    return True


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_quick_yes_is_never_wrong(draft: str) -> None:
    draw, num_sure = random.Random(draft), 0
    address = ADDRESSES.get(draft[:4], f"http://json-schema.org/{draft}/schema#")
    for _ in range(300):
        schema = draw_schema(draw)
        if not isinstance(schema, dict):
            continue
        schema |= {"$schema": address, "$defs": {name: draw_schema(draw, 3) for name in "xy"}}
        schema["definitions"] = schema["$defs"]
        is_sure = make_quick_yes(schema)
        for value in [draw_value(draw) for _ in range(15)]:
            if is_sure(value):
                num_sure += 1
                assert follows(schema, value), (schema, value)
    assert num_sure > 100


class Pet(BaseModel):
    name: str = Field(min_length=1)
    kind: str = Field(pattern="^[a-z]+$")


class Owner(BaseModel):
    pets: list[Pet] = Field(max_length=3)
    age: int | None = Field(default=None, ge=0)
    friends: list[Owner] = []


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "array", "items": {"enum": [10, 200]}, "minItems": 2, "maxItems": 2}, [10, 200]),
        ({"type": "object", "properties": {"a": {"type": "number"}}, "additionalProperties": False}, {"a": 1.5}),
        (Owner.model_json_schema(), {"pets": [{"name": "x", "kind": "dog"}], "age": 3, "friends": [{"pets": []}]}),
    ],
)
def test_values_of_usual_schemas_need_no_slow_look(schema: Any, value: Any) -> None:
    assert make_quick_yes(schema)(value)
    assert not make_quick_yes(schema)({"pets": [{"name": "", "kind": "dog"}]})


def test_a_schema_that_refers_to_itself_for_ever_is_not_sure() -> None:
    assert not make_quick_yes({"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}})(1)


def test_of_a_schema_of_the_third_draft_nothing_is_sure() -> None:
    assert not make_quick_yes({"$schema": "http://json-schema.org/draft-03/schema#", "type": "integer"})(1)
