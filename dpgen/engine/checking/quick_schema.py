"""Say quickly of most values that follow a JSON Schema that they do, so that jsonschema is asked about the others only.

- jsonschema makes a validator for each item of a list, and takes 0.1 ms for sixteen of them. Functions that are made of
  the schema once take 3 µs.
- Only a yes counts: it is "not sure" of a value that does not follow the schema, and of each keyword that is not known
  here. Then jsonschema decides, and gives the reason.
- A yes holds for each draft from the fourth on. So it is not sure of what drafts read differently: 1.0 as an integer,
  lists in `items`, references other than to a plain name in this schema.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

Quick = Callable[[Any], bool]  # True: the value follows the schema; False: not sure

_TYPES: dict[str, tuple[type, ...]] = {
    **{"object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),)},
    **{"integer": (int,), "number": (int, float)},
}
# They restrict no value: jsonschema checks no format unless it is asked to.
_ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "format"),
        *("$defs", "definitions"),
    }
)
_REFERENCE = re.compile(r"#/(\$defs|definitions)/([\w. -]+)", re.ASCII)
_NUMBERS = (int, float)
# The types that a keyword is about, what is compared of them, and how.
_LIMITS: dict[str, tuple[tuple[type, ...], Callable[[Any], Any] | None, Callable[[Any, Any], bool]]] = {
    **{"minItems": ((list,), len, operator.ge), "maxItems": ((list,), len, operator.le)},
    **{"minLength": ((str,), len, operator.ge), "maxLength": ((str,), len, operator.le)},
    **{"minProperties": ((dict,), len, operator.ge), "maxProperties": ((dict,), len, operator.le)},
    **{"minimum": (_NUMBERS, None, operator.ge), "maximum": (_NUMBERS, None, operator.le)},
    **{"exclusiveMinimum": (_NUMBERS, None, operator.gt), "exclusiveMaximum": (_NUMBERS, None, operator.lt)},
}


def make_quick_yes(schema: Any) -> Quick:
    """Return a function that is True for values which are sure to follow a JSON Schema."""
    root: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
    whole = {key: value for key, value in schema.items() if key != "$schema"} if root else schema
    if "draft-03" in str(root.get("$schema")):  # its `required` is another one
        return _is_never_sure
    check = _Compiler(root).compile(whole)

    def is_sure(value: Any) -> bool:
        try:
            return check(value)
        except RecursionError:  # a deep value, or references that lead back to themselves
            return False

    return is_sure


class _Compiler:
    """Make functions of the parts of one schema.

    Args:
        root: the whole, which references point into.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._by_reference: dict[str, Quick] = {}
        self._makers: dict[str, Callable[[Any, Mapping[str, Any]], Quick]] = {
            **{"type": _check_type, "enum": _check_enum, "pattern": _check_pattern, "required": _check_required},
            **{"const": lambda wanted, _: _check_enum([wanted], _), "$ref": self._follow, "items": self._check_items},
            **{"anyOf": self._check_any, "allOf": lambda wanted, _: _join([self.compile(part) for part in wanted])},
            **{"properties": self._check_properties, "additionalProperties": self._check_others},
        }

    def compile(self, schema: Any) -> Quick:
        """Return the function of a part."""
        if schema is True or not isinstance(schema, Mapping):
            return lambda value: schema is True
        checks = []
        for keyword, wanted in schema.items():
            if keyword in _LIMITS:
                checks.append(_check_limit(keyword, wanted))
            elif keyword not in _ANNOTATIONS:
                checks.append(self._makers[keyword](wanted, schema) if keyword in self._makers else _is_never_sure)
        return _join(checks)

    def _follow(self, wanted: Any, _: Mapping[str, Any]) -> Quick:
        found = _REFERENCE.fullmatch(wanted)
        section = self._root.get(found[1]) if found else None
        if found is None or not isinstance(section, Mapping) or found[2] not in section:
            return _is_never_sure
        if wanted not in self._by_reference:
            self._by_reference[wanted] = _is_never_sure  # replaced below, before any value is checked
            self._by_reference[wanted] = self.compile(section[found[2]])
        return lambda value: self._by_reference[wanted](value)

    def _check_any(self, wanted: Any, _: Mapping[str, Any]) -> Quick:
        checks = [self.compile(part) for part in wanted]
        return lambda value: any(check(value) for check in checks)

    def _check_items(self, wanted: Any, _: Mapping[str, Any]) -> Quick:
        check = self.compile(wanted)
        return lambda value: type(value) is not list or all(map(check, value))

    def _check_properties(self, wanted: Any, _: Mapping[str, Any]) -> Quick:
        checks = {name: self.compile(part) for name, part in wanted.items()}

        def are_sure(value: Any) -> bool:
            if type(value) is dict:
                for name, check in checks.items():
                    if name in value and not check(value[name]):
                        return False
            return True

        return are_sure

    def _check_others(self, wanted: Any, schema: Mapping[str, Any]) -> Quick:
        declared, check = frozenset(schema.get("properties", ())), self.compile(wanted)
        return lambda value: type(value) is not dict or all(check(value[name]) for name in value.keys() - declared)


def _join(checks: list[Quick]) -> Quick:
    """Return the function that is sure if all are."""
    if len(checks) == 1:
        return checks[0]

    def are_sure(value: Any) -> bool:
        for check in checks:  # noqa: SIM110 - half the time of all()
            if not check(value):
                return False
        return True

    return are_sure


def _check_type(wanted: Any, _: Mapping[str, Any]) -> Quick:
    names = wanted if isinstance(wanted, list) else [wanted]
    types = frozenset(type for name in names if isinstance(name, str) for type in _TYPES.get(name, ()))
    return lambda value: type(value) in types


def _check_enum(wanted: Any, _: Mapping[str, Any]) -> Quick:
    # With their types: 1, 1.0 and True are the same key of a set.
    allowed = frozenset((type(item), item) for item in wanted if item is None or isinstance(item, str | int))
    return lambda value: type(value) is not list and type(value) is not dict and (type(value), value) in allowed


def _check_pattern(wanted: Any, _: Mapping[str, Any]) -> Quick:
    try:
        search = re.compile(wanted).search
    except re.error:
        return _is_never_sure
    return lambda value: type(value) is not str or search(value) is not None


def _check_required(wanted: Any, _: Mapping[str, Any]) -> Quick:
    names = frozenset(wanted)
    return lambda value: type(value) is not dict or names <= value.keys()


def _check_limit(keyword: str, wanted: Any) -> Quick:
    types, measure, is_legal = _LIMITS[keyword]
    if type(wanted) not in _NUMBERS:  # draft 4 has a truth value in exclusiveMinimum
        return _is_never_sure
    if measure is None:
        return lambda value: type(value) not in types or is_legal(value, wanted)
    return lambda value: type(value) not in types or is_legal(measure(value), wanted)


def _is_never_sure(value: Any) -> bool:
    return False
