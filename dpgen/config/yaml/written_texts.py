"""Take the values of keys that are texts as they are written: ``007``, ``1e3`` and ``true`` are texts there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.config.options import find_type, is_text
from dpgen.config.yaml.yaml_source import KeyPath, YamlSource

# Texts within a passed-through section.
_TEXT_FIELDS = ("stop", "bad_words", "from_columns")


def take_texts_as_written(source: YamlSource, path: KeyPath, value: Any) -> Any:
    """Return the value of a key; a text is taken as it is written: ``1e3`` and ``true`` are texts there."""
    key = ".".join(path)
    if key in ("sampling", "sampling_by_rank"):
        return _take_fields_as_written(source, path, value)
    if find_type(key).startswith("int") and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6
    if not is_text(key) and key != "data.columns" and find_type(key) != "dict[str, str]":
        return value
    return _take_as_written(source, path, value)


def _take_fields_as_written(source: YamlSource, path: KeyPath, value: Any) -> Any:
    """Return a section of sampling, or a list of them, with the texts in it as they are written."""
    if isinstance(value, list):
        return [_take_fields_as_written(source, (*path, str(index)), item) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    return {
        name: _take_as_written(source, (*path, str(name)), item) if name in _TEXT_FIELDS else item
        for name, item in value.items()
    }


def _take_as_written(source: YamlSource, path: KeyPath, value: Any) -> Any:
    """Return a scalar, or those in a list or mapping, as the texts that are written, where no quotes are."""
    if isinstance(value, (list, Mapping)):
        items = enumerate(value) if isinstance(value, list) else value.items()
        texts = {name: source.find_plain_text((*path, str(name))) for name, _ in items}
        if isinstance(value, list):
            return [item if texts[index] is None else texts[index] for index, item in enumerate(value)]
        return {name: item if texts[name] is None else texts[name] for name, item in value.items()}
    text = source.find_plain_text(path)
    return value if text is None else text
