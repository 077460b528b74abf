"""Merge YAML files and the command line into a checked `Config`.

- One order of precedence, lowest first: the defaults in `dpgen.config.schema`, each YAML file from left to right, then
  ``key=value`` from the command line.
- All mistakes are reported at once: unreadable files, unknown keys, wrong types, wrong values and missing keys.
- A mistake that may only follow from another one is not reported beside it: a missing key whose name may have been
  misspelt, or keys that don't fit together.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from dpgen.config.schema import Config, describe_option, find_wrong_values, legal_keys
from dpgen.errors import ConfigError, find_nearest_name, suggest_name

# Texts in which `${` is never OmegaConf's: ``Price: ${{ price }}``.
_PROMPT_TEXTS = ("data.template", "data.system_prompt", "data.chat_template")


def load_from_args(arguments: Sequence[str]) -> Config:
    """Return the configuration of a command line: YAML files and ``key=value``, in any order.

    Raises:
        ConfigError: see `load`.
    """
    files = [argument for argument in arguments if "=" not in argument or os.path.isfile(argument)]
    return load(files, [argument for argument in arguments if argument not in files])


def load(files: Sequence[str], overrides: Sequence[str]) -> Config:
    """Merge YAML files, left to right, then ``key=value`` overrides, into a checked `Config`.

    Raises:
        ConfigError: files that aren't there or aren't YAML, unknown keys (each with the nearest legal one), wrong
            types, missing required keys, values outside their limits; all of them at once.
    """
    merger = _LayerMerger()
    for path in files:
        merger.add(path, _read_yaml)
    for text in overrides:
        merger.add(text, _read_override)
    return merger.make_config()


class _LayerMerger:
    """Merge layers into one configuration, and collect their mistakes."""

    def __init__(self) -> None:
        from omegaconf import OmegaConf

        # Config checks itself when it is made; until all layers are merged, keys may still be missing.
        self._merged: Any = OmegaConf.structured(Config)
        self._legal = [name for name, _, _ in legal_keys()]
        self._mistakes: list[str] = []
        self._suspects: set[str] = set()  # legal keys with a mistake, or nearest to a misspelt key
        self._has_read_all = True

    def add(self, source: str, read: Callable[[str], dict[str, Any]]) -> None:
        """Merge one layer over the layers before it, without its mistakes, which are noted.

        Args:
            source: a file's path, or ``key=value``; the messages name it.
            read: returns the source's sections.
        """
        try:
            layer = read(source)
        except ConfigError as error:
            self._mistakes += error.mistakes
            self._has_read_all = False
            return
        values = {}
        for path, value in _iter_keys(layer, self._legal):
            key = ".".join(path)
            if problem := _find_problem(path, value, self._legal):
                self._note_mistake(find_nearest_name(key, self._legal), f"{source}: {problem}")
            else:
                values[key] = value
        self._merge(source, values)

    def make_config(self) -> Config:
        """Return the merged and checked configuration.

        Raises:
            ConfigError: all mistakes.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            missing = sorted(OmegaConf.missing_keys(self._merged))
        except OmegaConfBaseException as error:
            hint = "(for a literal ${ write \\${)"
            raise ConfigError(*self._mistakes, f"{_summarize_error(error)} {hint}") from None
        self._note_missing(missing)
        try:
            if self._mistakes:
                self._mistakes += find_wrong_values(self._make_sections(missing))
            else:
                config = OmegaConf.to_object(self._merged)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            self._mistakes.append(_summarize_error(error))
        if self._mistakes:
            raise ConfigError(*dict.fromkeys(self._mistakes))
        assert isinstance(config, Config)
        return config

    def _merge(self, source: str, values: Mapping[str, Any]) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            self._merged = OmegaConf.merge(self._merged, OmegaConf.create(_nest(values)))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            if len(values) == 1:
                self._note_mistake(next(iter(values)), f"{source}: {_summarize_error(error)}")
                return
            for key, value in values.items():  # OmegaConf names only the first wrong key
                self._merge(source, {key: value})

    def _note_mistake(self, suspect: str | None, mistake: str) -> None:
        self._mistakes.append(mistake)
        if suspect is not None:
            self._suspects.add(suspect)

    def _note_missing(self, missing: Sequence[str]) -> None:
        unexplained = [key for key in missing if key not in self._suspects]
        if unexplained and self._has_read_all:
            first, pronoun = unexplained[0], "it" if len(unexplained) == 1 else "them"
            self._mistakes.append(
                f"missing: {', '.join(unexplained)}; set {pronoun} in a YAML file or as {first}=VALUE "
                f"({describe_option(first)})"
            )

    def _make_sections(self, missing: Sequence[str]) -> dict[str, Any]:
        """Return the sections, with a text for each missing key, so that the other keys can be checked."""
        from omegaconf import OmegaConf

        filled: Any = OmegaConf.merge(self._merged, _nest(dict.fromkeys(missing, "missing")))
        sections = {field.name: filled[field.name] for field in dataclasses.fields(Config)}
        return {
            name: OmegaConf.to_object(body) if OmegaConf.is_config(body) else body for name, body in sections.items()
        }


def _iter_keys(layer: Mapping[str, Any], legal: Collection[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the layer's keys, legal or not, with their values; a section that holds no keys is yielded itself."""
    for section, body in layer.items():
        if section in legal or not isinstance(body, Mapping) or (not body and not _is_section(section, legal)):
            yield (str(section),), body
        else:
            yield from (((str(section), str(name)), value) for name, value in body.items())


def _is_section(name: str, legal: Collection[str]) -> bool:
    return any(key.startswith(f"{name}.") for key in legal)


def _find_problem(path: tuple[str, ...], value: Any, legal: Collection[str]) -> str | None:
    key = ".".join(path)
    if key == "sampling_by_rank" and isinstance(value, Mapping):  # OmegaConf's message names no key
        return "sampling_by_rank is a list of sections: [{temperature: 0.2}, ...]"
    if _is_section(key, legal):
        return f"{key} is a section of keys, not a value: {key}.KEY=VALUE"
    if key not in legal:
        return f"unknown key {key!r}{suggest_name(key, legal, 'keys')}"
    if path != tuple(key.split(".")):
        section, _, name = key.partition(".")
        return f"{key!r} must be a key of its section: {section}: {{{name}: VALUE}}"
    return None


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layer of dotted keys, with `${` escaped in prompt texts."""
    layer: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if key in _PROMPT_TEXTS and isinstance(value, str):
            value = value.replace("${", "\\${")
        if name:
            layer.setdefault(section, {})[name] = value
        else:
            layer[section] = value
    return layer


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    from dpgen.config import yaml12

    try:
        with open(path, encoding="utf-8") as file:
            layer = yaml12.load(file.read())
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_summarize_error(error)}") from None
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise ConfigError(f"{path} must hold sections (run, data, model, ...), not a list or a value")
    return layer


def _read_override(text: str) -> dict[str, Any]:
    import yaml

    from dpgen.config import yaml12

    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        raise ConfigError(f"{text!r} is neither a YAML file nor key=value")
    try:
        layer = value if _takes_raw_text(key, value) else yaml12.load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{text}: the value is not valid YAML: {_summarize_error(error)}") from None
    for part in reversed(key.split(".")):
        layer = {part: layer}
    assert isinstance(layer, dict)
    return layer


def _takes_raw_text(key: str, value: str) -> bool:
    """Return True if a value on the command line is the text as it stands: a template, say, is not YAML."""
    if key == "data.path":
        return not value.startswith("[")
    section, _, name = key.partition(".")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if name and section in fields and dataclasses.is_dataclass(fields[section].default_factory):
        fields = {field.name: field for field in dataclasses.fields(fields[section].default_factory)}  # type: ignore[arg-type]
    option = fields.get(name or section)
    return option is not None and (option.type == "str" or (option.type == "str | None" and value != "null"))


def _summarize_error(error: Exception) -> str:
    """Return the lines of a library's message that help a user: what is wrong, and at which key or line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [lines[0]] if lines else [type(error).__name__]
    for line in lines[1:]:
        if line.startswith("full_key:"):
            kept.append(f"at {line.removeprefix('full_key:').strip()}")
        elif line.startswith("in ") or "line " in line:
            kept.append(line)
    return ", ".join(kept)
