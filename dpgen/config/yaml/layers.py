"""Make layers of configuration for OmegaConf out of dotted keys: a `${` that is no interpolation of its is text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpgen.config.schema_source import SCHEMA_KEYS

# Texts in which `${` is never OmegaConf's: ``Price: ${{ price }}``. Neither is it in a schema.
_PROMPT_TEXTS = ("data.template", "data.system_prompt", "data.chat_template", "data.tools")
# `${` that no interpolation of OmegaConf begins with: ``$${{``, ``^\\d+${``.
_NO_INTERPOLATION = re.compile(r"(\\*)\$\{(?!\s*[\w.\[$])")
_INTERPOLATION = re.compile(r"(\\*)\$\{(?=\s*[\w.\[$])")
_ESCAPED_DOLLAR = r"\1\1\\${"  # backslashes before ${ count twice in OmegaConf
_ANY_DOLLAR = re.compile(r"(\\*)\$\{")


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layer of dotted keys, with `${` escaped where it is text."""
    layer: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        is_literal = key in _PROMPT_TEXTS or (key in SCHEMA_KEYS and isinstance(value, Mapping))
        value = _escape(value, _ANY_DOLLAR if is_literal else _NO_INTERPOLATION)
        if name:
            layer.setdefault(section, {})[name] = value
        else:
            layer[section] = value
    return layer


def escape_dollars(value: Any) -> Any:
    """Return a value whose texts stand for themselves, each `${` included."""
    return _escape(value, _ANY_DOLLAR)


def make_literal(value: Any) -> Any:
    """Return a value for the command line whose texts stand for themselves: no `${` in them is an interpolation."""
    return _escape(value, _INTERPOLATION)


def _escape(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(_ESCAPED_DOLLAR, value)
    if isinstance(value, Mapping):
        return {name: _escape(item, pattern) for name, item in value.items()}
    return [_escape(item, pattern) for item in value] if isinstance(value, list) else value
