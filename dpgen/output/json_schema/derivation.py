"""Derive the type of a column from a JSON Schema, as far as nothing is lost.

- Typed are objects with declared properties, arrays of one kind of item, texts, numbers, truth values, and enums of
  one type; each of them with null, too.
- Any other part stays JSON text, with the reason: what several types, undeclared properties or a schema that refers to
  itself allow has no type in Arrow.
- Keywords that only restrict values (pattern, minLength, ...) change no type. Whether a value obeys them is not
  checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpgen.config.program import to_column_schema
from dpgen.output.json_schema.value_types import JsonTextType, ListType, ScalarType, StructType, ValueType

_MAX_PARTS = 1000  # of a schema whose definitions refer to each other again and again
_MAX_DEPTH = 32
_MAX_LISTED = 5
_MAX_INT64 = 2**63 - 1
_SCALARS = ("string", "integer", "number", "boolean")
_REFERENCES = ("$dynamicRef", "$recursiveRef")
# Keywords that say what a part is; beside $ref, anyOf or an enum they would have to be combined with it.
_STRUCTURE = frozenset(
    {
        *("$ref", "type", "properties", "items", "prefixItems", "anyOf", "oneOf", "allOf", "enum", "const"),
        *("additionalProperties", "patternProperties", "unevaluatedProperties"),
    }
)


@dataclass(frozen=True)
class DerivedType:
    """Hold what a schema makes of a column.

    Attributes:
        value_type: the type; None if the whole column stays JSON text.
        text_parts: (path, reason) of each part that stays JSON text; "$" is the whole.
    """

    value_type: ValueType | None
    text_parts: tuple[tuple[str, str], ...] = ()

    def describe_text_parts(self) -> str:
        """Return a sentence that names the parts that stay JSON text; "" if there are none."""
        if not self.text_parts:
            return ""
        if self.value_type is None:
            return f"output.schema: the column parsed is JSON text: {self.text_parts[0][1]}"
        parts = [f"{path} ({reason})" for path, reason in self.text_parts[:_MAX_LISTED]]
        num_more = len(self.text_parts) - len(parts)
        more = f" and {num_more:,} more" if num_more else ""
        return f"output.schema: the column parsed has JSON text in {', '.join(parts)}{more}"


class _NoType(ValueError):
    """Say why a part of a schema has no type."""


class _TooLarge(ValueError):
    """Say that the schema has too many parts for a column's type."""


def derive_type(schema: Mapping[str, Any]) -> DerivedType:
    """Return the type of a column that holds values of a JSON Schema."""
    deriver = _Deriver(schema)
    try:
        value_type = deriver.derive(schema, "$", ())
    except _TooLarge as error:
        return DerivedType(None, (("$", str(error)),))
    typed = None if isinstance(value_type, JsonTextType) else value_type
    return DerivedType(typed, tuple(dict.fromkeys(deriver.text_parts)))


def derive_returned_type(returns: Mapping[str, Any]) -> StructType | None:
    """Return the type of the dict that `program.returns` describes, a part for each column; None if it names none."""
    if not returns:
        return None
    types = {name: derive_type(to_column_schema(type)).value_type or JsonTextType() for name, type in returns.items()}
    return StructType(properties=tuple(types.items()), required=frozenset(types))


class _Deriver:
    """Walk through one schema.

    Args:
        root: the whole schema, which references point into.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._num_parts = 0
        self.text_parts: list[tuple[str, str]] = []

    def derive(self, schema: Any, path: str, references: tuple[str, ...]) -> ValueType:
        """Return the type of a part, JSON text if it has none.

        Args:
            path: of the part in a value, for the log.
            references: those that led here, so that one that leads back is noticed.
        """
        num_text_parts = len(self.text_parts)
        try:
            return self._derive(schema, path, references)
        except _NoType as error:
            self.text_parts[num_text_parts:] = [(path, str(error))]
            return JsonTextType()

    def _derive(self, schema: Any, path: str, references: tuple[str, ...]) -> ValueType:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise _TooLarge(f"the schema has more than {_MAX_PARTS:,} parts")
        if path.count(".") + path.count("[") >= _MAX_DEPTH or len(references) >= _MAX_DEPTH:
            raise _NoType("nested too deep")
        if not isinstance(schema, Mapping) or not schema:
            raise _NoType("any value is allowed")
        for keyword, follow in self._get_indirections().items():
            if keyword in schema:
                if beside := sorted((_STRUCTURE & schema.keys()) - {keyword}):
                    raise _NoType(f"{keyword} beside {beside[0]}")
                return follow(schema[keyword], path, references)
        if keyword := next((name for name in (*_REFERENCES, "then", "else", "dependentSchemas") if name in schema), ""):
            raise _NoType(keyword)
        if "enum" in schema or "const" in schema:
            return _derive_enum(schema)
        names, allows_null = _read_type_names(schema)
        return replace(self._derive_named(names, schema, path, references), allows_null=allows_null)

    def _get_indirections(self) -> dict[str, Callable[[Any, str, tuple[str, ...]], ValueType]]:
        alternatives = self._derive_alternatives
        return {"$ref": self._follow, "anyOf": alternatives, "oneOf": alternatives, "allOf": self._derive_all_of}

    def _follow(self, reference: Any, path: str, references: tuple[str, ...]) -> ValueType:
        if reference == "#" or reference in references:
            raise _NoType("it refers to itself")
        return self._derive(self._find(reference), path, (*references, reference))

    def _find(self, reference: Any) -> Any:
        """Return the part of the schema that a reference names.

        Raises:
            _NoType: it is not in this schema.
        """
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise _NoType(f"$ref to {reference!r}")
        target: Any = self._root
        for part in reference.removeprefix("#/").split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping) and name in target:
                target = target[name]
            elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            else:
                raise _NoType(f"$ref to {reference!r}")
        return target

    def _derive_all_of(self, parts: Any, path: str, references: tuple[str, ...]) -> ValueType:
        if not isinstance(parts, list) or len(parts) != 1:
            raise _NoType("allOf")
        return self._derive(parts[0], path, references)

    def _derive_alternatives(self, alternatives: Any, path: str, references: tuple[str, ...]) -> ValueType:
        if not isinstance(alternatives, list):
            raise _NoType("no alternatives")
        others = [item for item in alternatives if not _is_null(item)]
        types = [self._derive(item, path, references) for item in others]
        allows_null = len(others) < len(alternatives) or any(type.allows_null for type in types)
        kinds = list(dict.fromkeys(replace(type, allows_null=allows_null) for type in types))
        if len(kinds) == 1:
            return kinds[0]
        if kinds and {type.name if isinstance(type, ScalarType) else "" for type in kinds} == {"integer", "number"}:
            return ScalarType(allows_null, "number")
        raise _NoType("it may have several types" if kinds else "only null is allowed")

    def _derive_named(
        self, names: list[str], schema: Mapping[str, Any], path: str, references: tuple[str, ...]
    ) -> ValueType:
        if set(names) == {"integer", "number"}:
            return ScalarType(name="number")
        if len(names) != 1:
            raise _NoType("it may have several types" if names else "only null is allowed")
        [name] = names
        if name == "object":
            return self._derive_object(schema, path, references)
        if name == "array":
            if "prefixItems" in schema or isinstance(schema.get("items"), list):
                raise _NoType("each item has a type of its own")
            return ListType(items=self.derive(schema.get("items"), f"{path}[]", references))
        if name not in _SCALARS:
            raise _NoType(f"type {name!r}")
        if name == "integer" and _exceeds_int64(schema):
            raise _NoType("integers beyond 64 bits are allowed")
        return ScalarType(name=name)

    def _derive_object(self, schema: Mapping[str, Any], path: str, references: tuple[str, ...]) -> ValueType:
        for keyword in ("additionalProperties", "unevaluatedProperties"):
            if schema.get(keyword, False) is not False:
                raise _NoType(keyword)
        properties = schema.get("properties")
        if "patternProperties" in schema or not isinstance(properties, Mapping) or not all(properties):
            raise _NoType("patternProperties" if "patternProperties" in schema else "it declares no properties")
        if not properties:
            raise _NoType("it declares no properties")
        required = schema.get("required")
        types = [(str(name), self.derive(part, f"{path}.{name}", references)) for name, part in properties.items()]
        names = [name for name in required if name in properties] if isinstance(required, list) else []
        return StructType(properties=tuple(types), required=frozenset(names))


def _is_null(schema: Any) -> bool:
    return isinstance(schema, Mapping) and (schema.get("type") == "null" or schema.get("enum") == [None])


def _read_type_names(schema: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the names of a part's types without null, and whether null is among them."""
    given = schema.get("type")
    if given is None:
        given = "object" if "properties" in schema else "array" if "items" in schema else []
        if not given:
            raise _NoType("it has no type")
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    return [name for name in names if name != "null"], "null" in names


def _derive_enum(schema: Mapping[str, Any]) -> ValueType:
    """Return the type of an enum or a constant, whose values must all have the same."""
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    names = {_get_scalar_name(value) for value in values} if isinstance(values, list) else {""}
    allows_null = "null" in names and ("type" not in schema or _read_type_names(schema)[1])
    names.discard("null")
    if names == {"integer", "number"}:
        names = {"number"}
    if len(names) != 1 or "" in names:
        raise _NoType("its values have several types" if len(names) > 1 else "its values are no texts or numbers")
    return ScalarType(allows_null, names.pop())


def _get_scalar_name(value: Any) -> str:
    """Return the JSON Schema type of a text, number, truth value or null; "" for others and integers beyond 64 bits."""
    if value is None or isinstance(value, (bool, str)):
        return {bool: "boolean", str: "string"}.get(type(value), "null")
    if isinstance(value, int):
        return "integer" if -_MAX_INT64 <= value <= _MAX_INT64 else ""
    return "number" if isinstance(value, float) else ""


def _exceeds_int64(schema: Mapping[str, Any]) -> bool:
    bounds = [schema.get(name) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")]
    return any(isinstance(bound, (int, float)) and abs(bound) > _MAX_INT64 for bound in bounds)
