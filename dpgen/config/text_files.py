"""Read the files that keys of `data` name: ``@prompts/solve.jinja`` stands for the text of that file.

- Paths are relative to the working directory.
- The configuration then holds the text, so that a run is known by it, and all ranks compare it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpgen.formatting import suggest_conversion

# Of `data`. A line break at the end of these files is the editor's, and no part of the prompt.
_PROMPT_KEYS = ("template", "system_prompt")
FILE_KEYS = (*_PROMPT_KEYS, "chat_template", "tools")


def read_text_files(data: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the text of each file that a key names, by key, and one line for each file that can't be read.

    Args:
        data: values of keys of `data`.
    """
    texts: dict[str, str] = {}
    mistakes: list[str] = []
    for key, value in _iter_named(data):
        if value.startswith("@@"):
            texts[key] = value[1:]
            continue
        try:
            text = Path(value[1:]).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of `~name`, an unknown user
            mistakes.append(f"data.{key}={value} can't be read: {explain_unreadable(value[1:], error)}{_hint(key)}")
        else:
            texts[key] = text.removesuffix("\n") if key in _PROMPT_KEYS else text
    return texts, mistakes


def escape_file_name(key: str, value: Any) -> Any:
    """Return a value of `data` so that `read_text_files` takes it for itself, and not for the name of a file."""
    return f"@{value}" if any(_iter_named({key: value})) else value


def _iter_named(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the values that name a file, or begin with ``@@``; a text with braces or several lines is itself."""
    for key in FILE_KEYS:
        value = data.get(key)
        if isinstance(value, str) and value.startswith("@") and not any(sign in value for sign in "{}\n"):
            yield key, value


def explain_unreadable(path: str, error: Exception) -> str:
    """Return why a file that the configuration names can't be read."""
    if isinstance(error, FileNotFoundError):
        is_relative = not path.startswith(("/", "~"))
        return "there is no such file" + (f" in the working directory {os.getcwd()}" if is_relative else "")
    if isinstance(error, UnicodeDecodeError):
        place = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        return f"it is no UTF-8 ({place}); convert it, e.g. {suggest_conversion(error.object)}"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _hint(key: str) -> str:
    return "; a text that begins with @ is written @@" if key == "system_prompt" else ""
