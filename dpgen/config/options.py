"""Look up what is known about each key of the configuration: its default, its help, and which values it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from dpgen.config.schema import Config, iter_options

# Keys that hold texts beside other values, which their types can't say.
_MIXED_TEXTS = ("data.path", "data.chat_template")


def legal_keys() -> Iterator[tuple[str, Any, str]]:
    """Yield every legal key in order, as (dotted name, default, help)."""
    for name, option in iter_options():
        yield name, _get_default(option), option.metadata["help"]


def describe_option(key: str) -> str:
    """Return the help of one key."""
    return next(help for name, _, help in legal_keys() if name == key)


def find_type(key: str) -> str:
    """Return the annotation of a key; "" for one that is unknown, or a field of a passed-through section."""
    section, _, name = key.partition(".")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if name and section in fields and dataclasses.is_dataclass(fields[section].default_factory):
        fields = {field.name: field for field in dataclasses.fields(fields[section].default_factory)}  # type: ignore[arg-type]
    elif name:
        return ""
    option = fields.get(name or section)
    return "" if option is None else str(option.type)


def is_text(key: str) -> bool:
    """Return True if a key's value, or each item of it, is a text that is taken as it stands."""
    return key in _MIXED_TEXTS or find_type(key) in ("str", "str | None")


def is_utf8(text: str) -> bool:
    """Return True if a text can be written as UTF-8: it holds no byte of another encoding, and no half of a pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _get_default(option: dataclasses.Field[Any]) -> Any:
    return option.default_factory() if callable(option.default_factory) else option.default
