"""Merge YAML files and the command line into a checked `Config`.

- One order of precedence, lowest first: the defaults in `dpgen.config.schema`, each YAML file from left to right, then
  ``key=value`` from the command line.
- All mistakes are reported at once: unreadable files, unknown keys, wrong types, wrong values and missing keys.
- A mistake that may only follow from another one is not reported beside it: a missing key whose name may have been
  misspelt, or keys that don't fit together.
- A mistake in a file names its line. Where YAML itself is in the way, the line is shown, with a caret.
- A key whose value is a text takes it as it is written: ``007``, ``1e3`` and ``true`` are texts there.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpgen.config.schema import Config, describe_option, find_wrong_values, legal_keys
from dpgen.config.vllm_fields import find_section_of_field
from dpgen.errors import ConfigError, find_nearest_name, suggest_name

if TYPE_CHECKING:
    from dpgen.config.yaml_source import KeyPath, YamlSource

# Texts in which `${` is never OmegaConf's: ``Price: ${{ price }}``.
_PROMPT_TEXTS = ("data.template", "data.system_prompt", "data.chat_template")
# Texts in which a backslash and an n are likely meant as a line break.
_TEXTS_WITH_LINES = re.compile(
    r"data\.(template|system_prompt|chat_template)|sampling(_by_rank\.\d+)?\.(stop|bad_words)\b"
)
# Keys of no fixed type, and words that YAML 1.1 took for true and false: as texts, all of them count as true.
_UNTYPED = re.compile(r"(data\.chat_template_kwargs|engine)\.")
_PASSED_THROUGH = re.compile(r"(data\.chat_template_kwargs|engine|sampling)\.")
_YAML_1_1_BOOLEANS = re.compile(r"yes|no|on|off", re.IGNORECASE)


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
    from dpgen.config.yaml_source import read_file

    merger = _LayerMerger()
    for path in files:
        merger.add(path, read_file)
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
        self._places: dict[str, str | None] = {}  # the file and line of a key's last value; None: an argument

    def add(self, name: str, read: Callable[[str], YamlSource]) -> None:
        """Merge one layer over the layers before it, without its mistakes, which are noted.

        Args:
            name: a file's path, or ``key=value``.
            read: reads it.
        """
        try:
            source = read(name)
        except ConfigError as error:
            self._mistakes += error.mistakes
            self._has_read_all = False
            return
        values, paths = {}, {}
        for path, value in _iter_keys(source.value, self._legal):
            key = ".".join(path)
            if source.is_empty(path) and len(path) == 1 and key != "model":  # all its keys are in comments
                continue
            if problem := _find_problem(path, value, self._legal):
                self._note_mistake(find_nearest_name(key, self._legal), source.describe(path, problem))
            else:
                values[key], paths[key] = _take_texts_as_written(source, path, value), path
        self._note_places(source, values)
        self._mistakes += _find_misread_texts(source)
        self._merge(source, values, paths)

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
            mistake = self._add_place(f"{_summarize_error(error)} (for a literal ${{ write \\${{)")
            raise ConfigError(*self._mistakes, mistake) from None
        self._note_missing(missing)
        found: Sequence[str] = ()
        try:
            if self._mistakes:
                found = list(find_wrong_values(self._make_sections(missing)))
            else:
                config = OmegaConf.to_object(self._merged)
        except ConfigError as error:
            found = error.mistakes
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            found = [_summarize_error(error)]
        self._mistakes += map(self._add_place, found)
        if self._mistakes:
            raise ConfigError(*dict.fromkeys(self._mistakes))
        assert isinstance(config, Config)
        return config

    def _merge(self, source: YamlSource, values: Mapping[str, Any], paths: Mapping[str, KeyPath]) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            self._merged = OmegaConf.merge(self._merged, OmegaConf.create(_nest(values)))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            if len(values) == 1:
                [key] = values
                self._note_mistake(key, source.describe(paths[key], _summarize_error(error)))
                return
            for key, value in values.items():  # OmegaConf names only the first wrong key
                self._merge(source, {key: value}, paths)

    def _note_places(self, source: YamlSource, values: Mapping[str, Any]) -> None:
        replaced = tuple(f"{key}." for key, value in values.items() if not isinstance(value, Mapping))
        kept = {key: place for key, place in self._places.items() if not key.startswith(replaced)}
        new = {".".join(path): source.find_place(path) for path in source.nodes if path}
        self._places = kept | dict.fromkeys(values) | new

    def _add_place(self, mistake: str) -> str:
        """Return a mistake that a check of the whole configuration found, with the file and line of its key."""
        match = re.search(r"(?<=, at )[\w.\[\]]+", mistake) or re.match(r"[\w.\[\]]+", mistake)
        key = re.sub(r"\[(\d+)\]", r".\1", match[0]) if match else ""
        while key and key not in self._places:
            key = key.rpartition(".")[0]
        place = self._places.get(key)
        return f"{mistake} ({place})" if place else mistake

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


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _find_problem(path: tuple[str, ...], value: Any, legal: Collection[str]) -> str | None:
    key = ".".join(path)
    if key == "sampling_by_rank" and isinstance(value, Mapping):  # OmegaConf's message names no key
        return "sampling_by_rank is a list of sections: [{temperature: 0.2}, ...]"
    if _is_section(key, legal):
        return f"{key} is a section of keys, not a value: {key}.KEY=VALUE"
    if _find_type(key).startswith("dict") and not isinstance(value, Mapping) and not _is_interpolation(value):
        colon = re.match(r"([A-Za-z_]\w*):(?=\S)", value) if isinstance(value, str) else None
        hint = f"; a blank is missing after the colon of {value!r}" if colon else f": {key}.KEY=VALUE"
        return f"{key} is a section of keys, not a value{hint}"
    if _find_type(key).startswith("str") and isinstance(value, (Mapping, list)):
        return f"{key} is a text, not a {'section' if isinstance(value, Mapping) else 'list'}: {key}=TEXT"
    if key not in legal:
        section = find_section_of_field(path[-1])
        hint = f"; write {section}.{path[-1]}" if section else suggest_name(key, legal, "keys")
        return f"unknown key {key!r}{hint}"
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
            value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # backslashes before ${ count twice in OmegaConf
        if name:
            layer.setdefault(section, {})[name] = value
        else:
            layer[section] = value
    return layer


def _read_override(argument: str) -> YamlSource:
    from dpgen.config.yaml_source import read_argument, take_as_it_stands

    key, equals, text = argument.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        raise ConfigError(f"{argument!r} is neither a YAML file nor key=value")
    path = tuple(key.split("."))
    is_null = text == "null" and _find_type(key) == "str | None"
    is_list = text.startswith("[") and key == "data.path"
    if _is_text(key) and not is_null and not is_list:
        return take_as_it_stands(argument, path, text)
    return read_argument(argument, path, text, may_be_text=_find_type(key) in ("", "Any"))


def _find_type(key: str) -> str:
    section, _, name = key.partition(".")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if name and section in fields and dataclasses.is_dataclass(fields[section].default_factory):
        fields = {field.name: field for field in dataclasses.fields(fields[section].default_factory)}  # type: ignore[arg-type]
    option = fields.get(name or section)
    return "" if option is None else str(option.type)


def _is_text(key: str) -> bool:
    """Return True if a key's value, or each item of it, is a text that is taken as it stands."""
    return key == "data.path" or _find_type(key) in ("str", "str | None")


def _take_texts_as_written(source: YamlSource, path: KeyPath, value: Any) -> Any:
    """Return the value of a key; a text is taken as it is written: ``1e3`` and ``true`` are texts there."""
    key = ".".join(path)
    if _find_type(key).startswith("int") and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6
    if not _is_text(key) and key != "data.columns":
        return value
    if isinstance(value, list):
        texts = [source.find_plain_text((*path, str(index))) for index in range(len(value))]
        return [item if text is None else text for item, text in zip(value, texts, strict=True)]
    text = source.find_plain_text(path)
    return value if text is None else text


def _find_misread_texts(source: YamlSource) -> Iterator[str]:
    r"""Yield one line for each text that likely means something else than is read: ``\n``, ``enable_thinking: no``."""
    from dpgen.config import yaml_slips

    for path, text in _iter_texts(source.value):
        key = ".".join(path)
        if _TEXTS_WITH_LINES.match(key) and not source.reads_escapes(path) and yaml_slips.has_unread_escape(text):
            problem = yaml_slips.explain_unread_escape(key, text, is_yaml=path in source.nodes, is_file=source.is_file)
            yield source.describe_value(path, problem)
        if any(part.isdigit() for part in path) or not source.find_plain_text(path):
            continue
        if _UNTYPED.match(key) and _YAML_1_1_BOOLEANS.fullmatch(text):
            meant = "true" if text.lower() in ("yes", "on") else "false"
            problem = f"{text} is a text here, not {meant}; write {meant}, or for the text '{text}', with quotes"
            yield source.describe_value(path, problem)
        if _PASSED_THROUGH.match(key) and re.fullmatch(r"[-+]?\d+(_\d+)+", text):
            number = text.replace("_", "")
            problem = f"{text} is a text here, not {number}; write {number}, or for the text '{text}', with quotes"
            yield source.describe_value(path, problem)


def _iter_texts(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (Mapping, list)):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _iter_texts(item, (*path, str(name)))


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
