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
import functools
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpgen.config.options import describe_option, find_type, is_text, is_utf8, legal_keys
from dpgen.config.schema import Config, find_wrong_values
from dpgen.config.schema_source import SCHEMA_KEYS, read_schema
from dpgen.config.sections import MISSING
from dpgen.config.text_files import FILE_KEYS, read_text_files
from dpgen.config.vllm.vllm_fields import describe_home_of_field
from dpgen.config.yaml.layers import escape_dollars, nest
from dpgen.errors import ConfigError, find_nearest_name, suggest_name

if TYPE_CHECKING:
    from dpgen.config.yaml.yaml_source import KeyPath, YamlSource

_CHAT_TEMPLATE_NAME = re.compile(r"\{\s*name\s*:")  # {name: tool_use}, and no template
_KEY = re.compile(r"\w+(\.\w+)*")
_NULLS = ("null", "Null", "NULL", "~")
_SECTION_NAMES = tuple(field.name for field in dataclasses.fields(Config))
_LITERAL = " (for a literal ${ write \\${)"
# A schema takes the place of an earlier one: merged, they would be a third.
_SCHEMAS = (*SCHEMA_KEYS, "sampling.structured_outputs.json")
_REQUIRED = {name for name, default, _ in legal_keys() if default == MISSING}


def load_from_args(arguments: Sequence[str]) -> Config:
    """Return the configuration of a command line: YAML files and ``key=value``, in any order.

    Raises:
        ConfigError: see `load`.
    """
    return load(*split_arguments(arguments))


def load(files: Sequence[str], overrides: Sequence[str]) -> Config:
    """Merge YAML files, left to right, then ``key=value`` overrides, into a checked `Config`.

    Raises:
        ConfigError: files that aren't there or aren't YAML, unknown keys (each with the nearest legal one), wrong
            types, missing required keys, values outside their limits; all of them at once.
    """
    return _merge_layers(files, overrides).make_config()


def load_values(layers: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Config:
    """Merge YAML files and sections given as values, the last over all others, into a checked `Config`.

    Args:
        layers: (path of a file, None), or (name for messages, sections as a file holds them).

    Raises:
        ConfigError: see `load`.
    """
    from dpgen.config.yaml.yaml_source import YamlSource, read_file

    merger = _LayerMerger()
    for name, values in layers:
        if values is None:
            merger.add(name, read_file)
        else:
            merger.add(name, lambda name, values=values: YamlSource(name, "", False, dict(values)))  # type: ignore[misc]
    return merger.make_config()


def load_with_places(arguments: Sequence[str]) -> tuple[Config, dict[str, str | None]]:
    """Return the configuration of a command line, and where each key's value comes from.

    Returns:
        the configuration; and key → file and line, or None for the command line. Keys of nested values are dotted;
        a key that is not there has its default.

    Raises:
        ConfigError: see `load`.
    """
    merger = _merge_layers(*split_arguments(arguments))
    return merger.make_config(), merger.places


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the YAML files of a command line, and its overrides."""
    files = [argument for argument in arguments if "=" not in argument or os.path.isfile(argument)]
    return files, [argument for argument in arguments if argument not in files]


def _merge_layers(files: Sequence[str], overrides: Sequence[str]) -> _LayerMerger:
    from dpgen.config.yaml.yaml_source import read_file

    merger = _LayerMerger()
    for path in files:
        merger.add(path, read_file)
    for text in overrides:
        merger.add(text, _read_override)
    return merger


class _LayerMerger:
    """Merge layers into one configuration, and collect their mistakes.

    Attributes:
        places: the file and line of a key's last value; None for an argument of the command line.
    """

    def __init__(self) -> None:
        self._merged: Any = _make_defaults()
        self._legal = [name for name, _, _ in legal_keys()]
        self._mistakes: list[str] = []
        self._suspects: set[str] = set()  # legal keys with a mistake, or nearest to a misspelt key
        self._has_read_all = True
        self.places: dict[str, str | None] = {}

    def add(self, name: str, read: Callable[[str], YamlSource]) -> None:
        """Merge one layer over the layers before it, without its mistakes, which are noted.

        Args:
            name: a file's path, or ``key=value``.
            read: reads it.
        """
        from dpgen.config.yaml.misread_texts import find_misread_texts
        from dpgen.config.yaml.written_texts import take_texts_as_written

        try:
            source = read(name)
        except ConfigError as error:
            self._mistakes += error.mistakes
            self._has_read_all = False
            return
        values, paths = {}, {}
        for path, value in _iter_keys(source.value, self._legal):
            key = ".".join(path)
            if source.is_empty(path) and key in _SECTION_NAMES and key != "model":
                continue  # all its keys are in comments
            if problem := _find_problem(path, value, self._legal):
                self._note_mistake(find_nearest_name(key, self._legal), source.describe(path, problem))
            else:
                values[key], paths[key] = take_texts_as_written(source, path, value), path
        self._note_places(source, values)
        self._mistakes += find_misread_texts(source)
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
            raise ConfigError(*self._mistakes, self._add_place(_summarize_error(error))) from None
        self._note_missing(missing)
        found: Sequence[str] = ()
        try:
            self._insert_text_files()
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
            layer = OmegaConf.create(nest(values))
            for key in _SCHEMAS:
                if all(OmegaConf.is_dict(OmegaConf.select(config, key)) for config in (self._merged, layer)):
                    empty = OmegaConf.create()
                    OmegaConf.update(empty, key, None)
                    self._merged = OmegaConf.merge(self._merged, empty)
            self._merged = OmegaConf.merge(self._merged, layer)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            if len(values) == 1:
                [key] = values
                self._note_mistake(key, source.describe(paths[key], _summarize_error(error)))
                return
            for key, value in values.items():  # OmegaConf names only the first wrong key
                self._merge(source, {key: value}, paths)

    def _insert_text_files(self) -> None:
        """Put the content of each file or model that a key of `data` or of `SCHEMA_KEYS` names in the name's place."""
        from omegaconf import OmegaConf

        data = {key: OmegaConf.select(self._merged, f"data.{key}") for key in FILE_KEYS}
        texts, mistakes = read_text_files(data)
        contents: dict[str, dict[str, Any]] = {"data": texts} if texts else {}
        for key in SCHEMA_KEYS:
            if isinstance(name := OmegaConf.select(self._merged, key), str):
                section, _, field = key.partition(".")
                contents[section] = {field: None}  # where it can't be read
                try:
                    contents[section] = {field: read_schema(key, name)}
                except ConfigError as error:
                    mistakes += error.mistakes
        self._mistakes += map(self._add_place, mistakes)
        if contents:
            self._merged = OmegaConf.merge(self._merged, escape_dollars(contents))

    def _note_places(self, source: YamlSource, values: Mapping[str, Any]) -> None:
        replaced = tuple(f"{key}." for key, value in values.items() if not isinstance(value, Mapping))
        kept = {key: place for key, place in self.places.items() if not key.startswith(replaced)}
        new = {".".join(path): source.find_place(path) for path in source.nodes if path}
        self.places = kept | dict.fromkeys(values) | new

    def _add_place(self, mistake: str) -> str:
        """Return a mistake that a check of the whole configuration found, with the file and line of its key."""
        match = re.search(r"(?<=, at )[\w.\[\]]+", mistake) or re.match(r"[\w.\[\]]+", mistake)
        key = re.sub(r"\[(\d+)\]", r".\1", match[0]) if match else ""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        place = self.places.get(key)
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

        filled: Any = OmegaConf.merge(self._merged, nest(dict.fromkeys(missing, "missing")))
        sections = {field.name: filled[field.name] for field in dataclasses.fields(Config)}
        return {
            name: OmegaConf.to_object(body) if OmegaConf.is_config(body) else body for name, body in sections.items()
        }


@functools.cache
def _make_defaults() -> Any:
    """Return the defaults, without `Config`'s checks: keys are still missing. Merging copies it; loads share one."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(Config)


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
    from dpgen.config.yaml.misread_texts import iter_texts

    key = ".".join(path)
    is_no_mapping = not isinstance(value, Mapping) and not _is_interpolation(value)
    if _is_section(key, legal) or (_is_passed_through(key) and is_no_mapping):
        return _describe_no_section(key, value)
    if key not in legal:
        return _describe_unknown(path, key, legal)
    if path != tuple(key.split(".")):
        section, _, name = key.partition(".")
        return f"{key!r} must be a key of its section: {section}: {{{name}: VALUE}}"
    is_needed = key in _REQUIRED and value == MISSING  # OmegaConf's sign of a value that another source gives
    missing = [".".join(place) for place, text in iter_texts(value, path) if text == MISSING]
    if missing and not is_needed:
        return f"{missing[0]}: {MISSING} stands for a value that is missing, and can't be given; leave the key out"
    return _find_wrong_type(key, value)


def _find_wrong_type(key: str, value: Any) -> str | None:
    """Return what is wrong with a value whose type OmegaConf would take, or would reject without naming the key."""
    kind, is_interpolation = find_type(key), _is_interpolation(value)
    if key == "sampling_by_rank" and not (
        is_interpolation or (isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value))
    ):
        return "sampling_by_rank is a list of sections: [{temperature: 0.2}, ...]"
    if kind.startswith("str") and isinstance(value, (Mapping, list)):
        return f"{key} is a text, not a {'section' if isinstance(value, Mapping) else 'list'}: {key}=TEXT"
    if kind == "bool" and isinstance(value, int) and value not in (0, 1):
        return f"{key}={value}: must be true or false"
    if kind == "list[str] | None" and value is not None and not is_interpolation:
        is_list_of_names = isinstance(value, list) and all(isinstance(name, (str, int, float)) for name in value)
        return None if is_list_of_names else f"{key} is a list of names: {key}=[NAME, ...]"
    return None


def _is_passed_through(key: str) -> bool:
    return find_type(key).startswith("dict")


def _describe_no_section(key: str, value: Any) -> str:
    colon = re.match(r"([A-Za-z_]\w*):(?=\S)", value) if isinstance(value, str) else None
    hint = f"; a blank is missing after the colon of {value!r}" if colon else f": {key}.KEY=VALUE"
    return f"{key} is a section of keys, not a value{hint}"


def _describe_unknown(path: KeyPath, key: str, legal: Collection[str]) -> str:
    section, _, name = key.partition(".")
    if len(path) == 1 and name and _is_passed_through(section):  # sampling.temperature: 1
        return f"{key!r} must be a key of its section: {section}: {{{name}: VALUE}}"
    hint = describe_home_of_field(path[-1], legal)
    return f"unknown key {key!r}{hint or suggest_name(key, legal, 'keys')}"


def _read_override(argument: str) -> YamlSource:
    from dpgen.config.yaml.yaml_source import read_argument, take_as_it_stands

    key, equals, text = argument.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"{argument!r} is neither a YAML file nor key=value{_suggest_argument(argument)}")
    if not is_utf8(argument):
        is_path = key == "data.path"
        remedy = "name the file by a pattern, ? for such a byte" if is_path else "give it in a YAML file"
        raise ConfigError(f"{key}: {argument!r} is no UTF-8: {remedy}, or in the encoding of the terminal")
    path = tuple(key.split("."))
    is_null = text in _NULLS and (find_type(key) == "str | None" or key == "data.chat_template")
    is_list = text.startswith("[") and key == "data.path"
    is_name = key == "data.chat_template" and _CHAT_TEMPLATE_NAME.match(text) is not None
    names_file = key in ("data.tools", *SCHEMA_KEYS) and text.startswith("@")
    if names_file or (is_text(key) and not is_null and not is_list and not is_name):
        return take_as_it_stands(argument, path, text)
    return read_argument(argument, path, text, may_be_text=find_type(key) in ("", "Any"))


def _suggest_argument(argument: str) -> str:
    """Return how to write an argument that has the form of another tool; "" if none is recognised."""
    match = re.fullmatch(r"[-+~\s]*([A-Za-z][\w.-]*?)\s*(?:[=:]\s*(.*))?", argument, re.DOTALL)
    key = "" if match is None else re.sub(r"(?<=\w)-(?=\w)", "_", match[1])
    if (
        match is None
        or not _KEY.fullmatch(key)
        or not (find_type(key) or key.startswith(tuple(f"{name}." for name in _SECTION_NAMES)))
    ):
        return ""
    if argument.startswith("~"):
        return f"; no key can be removed: write {key}=null"
    return f"; write {key}={'VALUE' if match[2] is None else match[2]}"


def _summarize_error(error: Exception) -> str:
    """Return the lines of a library's message that help a user: what is wrong, and at which key or line."""
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [lines[0]] if lines else [type(error).__name__]
    if variable := re.search(r"Environment variable '(.*)' not found", kept[0]):
        kept[0] = f"the environment variable {variable[1]} is not set"
    elif isinstance(error, (GrammarParseError, InterpolationResolutionError)) and "could not be conv" not in kept[0]:
        name = re.search(r"Interpolation key '(\w+)' not found", kept[0])
        is_variable = name is not None and name[1] in os.environ
        kept[0] += f" (for an environment variable write ${{oc.env:{name[1]}}})" if name and is_variable else _LITERAL
    for line in lines[1:]:
        if line.startswith("full_key:"):
            kept.append(f"at {line.removeprefix('full_key:').strip()}")
        elif line.startswith("in ") or "line " in line:
            kept.append(line)
    return ", ".join(kept)
