"""Define the types that a JSON Schema can give to a column, and fit JSON values to them.

- Nothing is lost: a value that its type can't hold does not fit, and says why.
- A property that is absent is null in its struct; a null fits only where the schema allows one.
- A part that has no type of its own is JSON text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpgen.formatting import describe_type

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_INT64 = 2**63 - 1


class Misfit(ValueError):
    """Say which part of a value does not fit its type, and why."""


@dataclass(frozen=True)
class ValueType:
    """Describe one part of a JSON value; see the subclasses.

    Attributes:
        allows_null: True if the schema allows null here.
    """

    allows_null: bool = False

    def to_arrow(self) -> pa.DataType:
        """Return the Arrow type of the values that `convert` returns."""
        raise NotImplementedError

    def convert(self, value: Any, path: str = "$") -> Any:
        """Return a JSON value as Arrow takes it.

        Raises:
            Misfit: the type can't hold the value.
        """
        if value is None and self.allows_null:
            return None
        return self._convert(value, path)

    def _convert(self, value: Any, path: str) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class ScalarType(ValueType):
    """Describe a text, number or truth value: "string", "integer" (64 bits), "number" (a double) or "boolean"."""

    name: str = "string"

    def to_arrow(self) -> pa.DataType:
        import pyarrow as pa

        types = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
        return types[self.name]

    def _convert(self, value: Any, path: str) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.name == "integer" and is_number and value == int(value):
            if not -_MAX_INT64 - 1 <= value <= _MAX_INT64:
                raise Misfit(f"{path} is an integer beyond 64 bits")
            return int(value)
        if self.name == "number" and is_number:
            return _to_double(value, path)
        if (self.name == "string" and isinstance(value, str)) or (self.name == "boolean" and isinstance(value, bool)):
            return value
        raise _make_wrong_type(value, path, self.name)


@dataclass(frozen=True)
class ListType(ValueType):
    """Describe an array whose items all have one type."""

    items: ValueType = ScalarType()

    def to_arrow(self) -> pa.DataType:
        import pyarrow as pa

        return pa.list_(self.items.to_arrow())

    def _convert(self, value: Any, path: str) -> Any:
        if not isinstance(value, list):
            raise _make_wrong_type(value, path, "array")
        return [self.items.convert(item, f"{path}[{index}]") for index, item in enumerate(value)]


@dataclass(frozen=True)
class StructType(ValueType):
    """Describe an object by its properties.

    Attributes:
        properties: (name, type) of each, in the schema's order.
        required: the names of those that may not be absent.
    """

    properties: tuple[tuple[str, ValueType], ...] = ()
    required: frozenset[str] = frozenset()

    def to_arrow(self) -> pa.DataType:
        import pyarrow as pa

        return pa.struct([(name, type.to_arrow()) for name, type in self.properties])

    def _convert(self, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise _make_wrong_type(value, path, "object")
        types = dict(self.properties)
        for name in value:
            if name not in types:
                raise Misfit(f"{path} has the property {name!r}, which the schema does not declare")
        for name in sorted(self.required):
            if name not in value:
                raise Misfit(f"{path} lacks the required property {name!r}")
        return {
            name: type.convert(value[name], f"{path}.{name}") if name in value else None
            for name, type in self.properties
        }


@dataclass(frozen=True)
class JsonTextType(ValueType):
    """Describe a part that stays JSON text, since no Arrow type holds all of its values."""

    def to_arrow(self) -> pa.DataType:
        import pyarrow as pa

        return pa.string()

    def convert(self, value: Any, path: str = "$") -> Any:
        """Return a JSON value as its text; a null, too, so that it differs from an absent one."""
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_value(text: str | None, value_type: ValueType) -> tuple[Any, str | None]:
    """Return a JSON text's value as Arrow takes it, and why it does not fit; one of them is None.

    Args:
        text: JSON; None for no value, which fits.
    """
    if text is None:
        return None, None
    try:
        return value_type.convert(json.loads(text)), None
    except Misfit as misfit:
        return None, f"does not fit output.schema: {misfit}"
    except RecursionError:
        return None, "does not fit output.schema: it is nested too deep"


def _to_double(value: float, path: str) -> float:
    """Return a number as a double.

    Raises:
        Misfit: an integer with more digits than a double has.
    """
    if isinstance(value, int) and (value.bit_length() > 1023 or int(float(value)) != value):
        raise Misfit(f"{path} is an integer with more digits than a 64-bit float has")
    return float(value)


def _make_wrong_type(value: Any, path: str, name: str) -> Misfit:
    article = "an" if name[0] in "aio" else "a"
    return Misfit(f"{path} is {describe_type(value)}, not {article} {name}")
