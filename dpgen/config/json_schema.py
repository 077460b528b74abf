"""Describe the configuration as a JSON Schema, for editors (`# yaml-language-server: $schema=...`) and for completion.

- The schema follows from the dataclasses: types, defaults, help, limits and choices. conf/config.schema.json is this
  schema; a test compares the two.
- It is about one file of several, so no key is required. What must fit together is checked by `dpgen config`.
- `${...}` may stand for any value. A key whose value is a text takes numbers and booleans as they are written.
- `engine` and `sampling` are open: fields that are not listed are passed to vLLM as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dpgen.config.checks import find_wrong_engine_keys
from dpgen.config.media.media_checks import MEDIA_COLUMN_KEYS
from dpgen.config.schema import Config
from dpgen.config.sections import MISSING
from dpgen.config.vllm.vllm_fields import iter_old_fields
from dpgen.config.vllm.vllm_types import ENGINE_TYPES, ENGINE_VALUES, SAMPLING_TYPES, list_fields
from dpgen.errors import ERROR_TYPES

Schema = dict[str, Any]

_TEXT: Schema = {"type": ["string", "number", "boolean"]}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_INTERPOLATION: Schema = {"type": "string", "pattern": r"\$\{"}
_RESERVED = (
    *("model", "seed", "enable_expert_parallel", "tensor_parallel_size", "pipeline_parallel_size"),
    *("distributed_executor_backend", "data_parallel_size"),
)
# Keys of the type Any, whose values `dpgen.config.checks` and `PromptConfig` check.
_ANY_KEYS: dict[str, Schema] = {
    "retry_errors": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"enum": list(ERROR_TYPES)}}]},
    "path": {"anyOf": [_TEXT, {**_TEXTS, "minItems": 1}]},
    "engines_per_rank": {"anyOf": [{"enum": ["auto"]}, {"type": "integer", "minimum": 1}]},
    **{key: {"anyOf": [{"type": ["string", "null"]}, {**_TEXTS, "minItems": 1}]} for key in MEDIA_COLUMN_KEYS},
    "media_workers": {"anyOf": [{"enum": ["auto"]}, {"type": "integer", "minimum": 1}]},
    "chat_template": {
        "anyOf": [
            {"type": ["string", "null"]},
            {
                "type": "object",
                "properties": {"name": {"type": "string"}},
                "required": ["name"],
                "additionalProperties": False,
            },
        ]
    },
    "tools": {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "object"}}]},
    **{key: {"type": ["string", "object", "boolean", "null"]} for key in ("schema", "json_schema")},
}


def build_json_schema() -> Schema:
    """Return the JSON Schema (draft 7) of a configuration file."""
    hints = get_type_hints(Config)
    properties = {}
    for field in dataclasses.fields(Config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            properties[field.name] = _build_section(kind)
        else:
            properties[field.name] = _build_key(field, kind)
    properties["engine"] |= _build_open_section("engine")
    properties["sampling"] |= _build_open_section("sampling")
    entry = _build_open_section("sampling_by_rank")
    properties["sampling_by_rank"] |= _allow_interpolation({"type": "array", "items": entry})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "dpgen configuration",
        "description": "A configuration file of `dpgen run`; several are merged from left to right.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def list_value_choices() -> dict[str, list[str]]:
    """Return the values that each key can be completed with, by its dotted name; an empty list where any is possible.

    Fields that vLLM or dpgen reject are left out.
    """
    choices: dict[str, list[str]] = {}
    for name, section in build_json_schema()["properties"].items():
        keys = section.get("properties", {})
        choices |= {f"{name}.{key}": list(_iter_choices(body)) for key, body in keys.items() if _is_legal(body)}
        if not keys:
            choices[name] = []
    return choices


def _build_section(kind: Any) -> Schema:
    hints = get_type_hints(kind)
    text = (kind.__doc__ or "").strip().splitlines()[0].partition(": ")[2].rstrip(".")
    return {
        "type": ["object", "null"],  # null: all keys of the section are in comments
        "description": text,
        "properties": {field.name: _build_key(field, hints[field.name]) for field in dataclasses.fields(kind)},
        "additionalProperties": False,
    }


def _build_key(field: dataclasses.Field[Any], kind: Any) -> Schema:
    schema = _ANY_KEYS[field.name] if kind is Any else _build_type(kind, field.metadata["minimum"])
    is_text = schema in (_TEXT, _allow_null(_TEXT))
    default = field.default_factory() if callable(field.default_factory) else field.default
    described = {"description": field.metadata["help"], **(schema if is_text else _allow_interpolation(schema))}
    return described if default == MISSING else {**described, "default": default}


def _build_type(kind: Any, minimum: float | None) -> Schema:
    limit = {} if minimum is None else {"minimum": minimum}
    if kind is str:
        return _TEXT
    if kind is bool:
        return {"type": "boolean"}
    if kind in (int, float):
        return {"type": "integer" if kind is int else "number", **limit}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _build_type(arguments[0], None)}
    if origin is dict:
        values = {} if arguments[1] is Any else {"additionalProperties": _build_type(arguments[1], None)}
        return {"type": ["object", "null"], **values}
    [inner] = [argument for argument in arguments if argument is not type(None)]  # X | None
    return _allow_null(_build_type(inner, minimum))


def _build_open_section(name: str) -> Schema:
    """Return the section of vLLM's fields: those that are known, what became of old ones, and any other."""
    is_engine = name == "engine"
    properties: dict[str, Any] = {}
    for field, types in list_fields(ENGINE_TYPES if is_engine else SAMPLING_TYPES).items():
        known = _allow_interpolation({"type": [*types, "null"]})
        if is_engine and field in ENGINE_VALUES:  # suggested; other values are taken, too
            known = {"anyOf": [{"enum": list(ENGINE_VALUES[field])}, {"type": ["string", "null"]}]}
        properties[field] = known
    for field, hint in iter_old_fields(name):
        properties.setdefault(field, {"deprecated": True, "deprecationMessage": hint, "description": hint})
    if is_engine:
        for field in _RESERVED:
            [problem] = find_wrong_engine_keys({field: None})
            properties[field] = {"not": {}, "description": problem}
    elif name == "sampling":
        text = "fields that each row takes from a column: {max_tokens: budget}"
        properties["from_columns"] = {"description": text, "type": ["object", "null"], "additionalProperties": _TEXT}
    return {"properties": properties, **({"type": "object"} if name == "sampling_by_rank" else {})}


def _allow_null(schema: Schema) -> Schema:
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return {**schema, "type": [*types, "null"]}


def _allow_interpolation(schema: Schema) -> Schema:
    """Return a schema that also takes ``${...}``, which stands for a value given elsewhere."""
    return {"anyOf": [*schema.get("anyOf", [schema]), _INTERPOLATION]}


def _is_legal(schema: Schema) -> bool:
    return "deprecated" not in schema and "not" not in schema


def _iter_choices(schema: Schema) -> Iterator[str]:
    for part in schema.get("anyOf", [schema]):
        yield from (str(value) for value in part.get("enum", ()) if value is not None)
        if part.get("type") in ("boolean", ["boolean", "null"]):
            yield from ("true", "false")
