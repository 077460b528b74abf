"""Read the numbers and flags of `engine.*`, also where they are texts: "16" in quotes, or filled in by a script.

vLLM takes such texts, and dpgen reckons with some of the same keys: so they are numbers from the start. A value that
stands for none is a mistake. Whether a number is too small or too large is left to vLLM.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dpgen.config.vllm.vllm_types import ENGINE_TYPES

_KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}
_TYPES = {name: type for type in _KINDS for name in ENGINE_TYPES[type].split()}
_FLAGS = {
    **dict.fromkeys(("true", "yes", "on", "1", "t", "y"), True),
    **dict.fromkeys(("false", "no", "off", "0", "f", "n"), False),
}


def read_engine_numbers(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, with numbers and flags in place of the texts that stand for them."""
    return {name: read_number(_TYPES[name], value) if name in _TYPES else value for name, value in engine.items()}


def find_wrong_engine_numbers(engine: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each option that must be a number or a flag and is none. null is left to vLLM."""
    for name, value in read_engine_numbers(engine).items():
        type = _TYPES.get(name)
        if type is not None and value is not None and not _is_of(type, value):
            yield f"engine.{name}={value!r}: must be {_KINDS[type]}"


def read_number(type: str, value: Any) -> Any:
    """Return what vLLM takes a value for; the value itself if it stands for nothing of this type.

    Args:
        type: "integer", "number" or "boolean".
    """
    if type == "boolean":
        return _FLAGS.get(str(value).strip().lower(), value)
    if isinstance(value, str):
        for read in (int, float):
            with contextlib.suppress(ValueError):
                value = read(value)
                break
    is_whole = type == "integer" and isinstance(value, float) and value.is_integer()
    return int(value) if is_whole else value


def _is_of(type: str, value: Any) -> bool:
    if isinstance(value, bool) or type == "boolean":
        return isinstance(value, bool) and type == "boolean"
    return isinstance(value, int) or (type == "number" and isinstance(value, float) and math.isfinite(value))
