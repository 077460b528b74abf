"""Read the JSON Schemas that keys name: a file, or a Pydantic model by its import path.

- The configuration then holds the schema itself, so that a run is known by it, and all ranks compare it.
- A model is imported in a process of its own, ``python -m dpgen.config.schema_source package.module:Model``: what its
  module imports, prints or breaks stays there. The last line of stdout is the schema, or of stderr what failed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpgen.config.text_files import explain_unreadable
from dpgen.config.tools import parse_json_text
from dpgen.errors import ConfigError
from dpgen.formatting import describe_type
from dpgen.imports import list_import_folders

SCHEMA_KEYS = ("output.schema", "check.json_schema")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_IMPORT_TIMEOUT_S = 300.0  # a model's module may import torch from a slow disk


def read_schema(key: str, value: str) -> dict[str, Any]:
    """Return the JSON Schema that the text of a key stands for.

    Args:
        key: one of `SCHEMA_KEYS`, for errors.
        value: ``@schemas/answer.json`` or the path alone, relative to the working directory; ``package.module:Model``;
            or the schema as JSON text.

    Raises:
        ConfigError: there is no such file or model, or it holds no JSON object.
    """
    if _IMPORT_PATH.fullmatch(value):
        return _import_model_schema(key, value)
    text, where = value, "it"
    if not value.lstrip().startswith("{"):
        path = value.removeprefix("@")
        text, where = _read_file(key, path), path
    try:
        schema = parse_json_text(text)
    except ValueError as error:
        raise ConfigError(f"{key}={_shorten(value)}: {where}: {error}") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"{key}={_shorten(value)}: {where} holds {describe_type(schema)}, not a JSON Schema object")
    return schema


def find_wrong_schema(key: str, schema: Any, *, may_be_any: bool) -> Iterator[str]:
    """Yield one line if the value of a key is no schema.

    Args:
        may_be_any: True where a schema may take any JSON value: {}, true or false.
    """
    if (isinstance(schema, Mapping) and (schema or may_be_any)) or (may_be_any and isinstance(schema, bool)):
        return
    yield (
        f"{key}={schema!r}: must be a JSON Schema, its file (@schemas/answer.json), or a Pydantic model "
        "(package.module:Model)"
    )


def _read_file(key: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of `~name`, an unknown user
        raise ConfigError(f"{key}={path} can't be read: {explain_unreadable(path, error)}") from None


def _import_model_schema(key: str, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "dpgen.config.schema_source", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(list_import_folders()), "CUDA_VISIBLE_DEVICES": ""}
    try:
        run = subprocess.run(command, capture_output=True, env=environment, timeout=_IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{key}={name}: importing it took longer than {_IMPORT_TIMEOUT_S:.0f} s") from None
    lines = (run.stderr if run.returncode else run.stdout).decode(errors="replace").strip().splitlines()
    if run.returncode or not lines:
        reason = lines[-1] if lines else f"its process ended with status {run.returncode}"
        raise ConfigError(f"{key}={name}: {reason}")
    schema: dict[str, Any] = json.loads(lines[-1])
    return schema


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def print_model_schema() -> None:
    """Print the schema of the model that the command line names."""
    module, _, name = sys.argv[1].partition(":")
    try:
        print("\n" + json.dumps(_build_schema(module, name)), flush=True)
    except BaseException as error:  # noqa: BLE001 - a user's module may raise anything, SystemExit included
        print(f"\n{_describe(error)}", file=sys.stderr, flush=True)
        sys.exit(1)


def _build_schema(module: str, name: str) -> dict[str, Any]:
    model: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(model, part):
            raise LookupError(f"{module} has no {name}")
        model = getattr(model, part)
    if not hasattr(model, "model_json_schema"):
        raise TypeError(f"{name} is no Pydantic model: it has no model_json_schema")
    schema: dict[str, Any] = model.model_json_schema()
    return schema


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    is_own = isinstance(error, (LookupError, TypeError)) and text
    return text if is_own else f"{type(error).__name__}: {text}".rstrip(": ")


if __name__ == "__main__":
    print_model_schema()
