"""From YAML files and the command line to a checked `Config`.

One order of precedence, lowest first: the defaults in `dpgen.config.schema`, each YAML file from left to right, then
``key=value`` from the command line.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpgen.config.schema import Config, describe_option, legal_keys
from dpgen.errors import ConfigError, suggest_name


def load_from_args(arguments: Sequence[str]) -> Config:
    """The configuration of a command line: YAML files and ``key=value``, in any order.

    Raises:
        ConfigError: see `load`.
    """
    files = [each for each in arguments if "=" not in each or os.path.isfile(each)]
    return load(files, [each for each in arguments if each not in files])


def load(files: Sequence[str], overrides: Sequence[str]) -> Config:
    """Merges YAML files, left to right, then ``key=value`` overrides, into a checked `Config`.

    Raises:
        ConfigError: a file that isn't there or isn't YAML, an unknown key (with its nearest legal
            neighbour), a wrong type, a missing required key, a value outside its limits.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # The frozen classes are checked when they are made; until all is merged they may still lack keys.
    merged: Any = OmegaConf.structured(Config)
    for source, layer in [*((f, _read_yaml(f)) for f in files), *((o, _read_override(o)) for o in overrides)]:
        _reject_unknown_keys(source, layer)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(_escape_interpolation(layer)))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ConfigError(f"{source}: {_summarize_error(error)}") from None
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_summarize_error(error)} (for a literal ${{ write \\${{)") from None
    if missing:
        first = missing[0]
        raise ConfigError(
            f"missing: {', '.join(missing)}; give it in a YAML file or as {first}=VALUE ({describe_option(first)})"
        )
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(_summarize_error(error)) from None
    assert isinstance(config, Config)
    return config


def _escape_interpolation(layer: Any) -> Any:
    """The layer with `${` escaped in prompt texts, where it is never OmegaConf's: ``Price: ${{ price }}``."""
    data = layer.get("data")
    if not isinstance(data, dict):
        return layer
    texts = ("template", "system_prompt", "chat_template")
    literal = {name: data[name].replace("${", "\\${") for name in texts if isinstance(data.get(name), str)}
    return {**layer, "data": {**data, **literal}}


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
        found = value if _takes_raw_text(key, value) else yaml12.load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{text}: the value is not valid YAML: {_summarize_error(error)}") from None
    for part in reversed(key.split(".")):
        found = {part: found}
    assert isinstance(found, dict)
    return found


def _takes_raw_text(key: str, value: str) -> bool:
    """Whether a value on the command line is taken as it stands, as a text key's is: a template is no YAML."""
    if key == "data.path":
        return not value.startswith("[")
    section, _, name = key.partition(".")
    fields = {each.name: each for each in dataclasses.fields(Config)}
    if name and section in fields and dataclasses.is_dataclass(fields[section].default_factory):
        fields = {each.name: each for each in dataclasses.fields(fields[section].default_factory)}  # type: ignore[arg-type]
    each = fields.get(name or section)
    return each is not None and (each.type == "str" or (each.type == "str | None" and value != "null"))


def _reject_unknown_keys(source: str, layer: Any) -> None:
    legal = {name for name, _, _ in legal_keys()}
    sections = {name.partition(".")[0] for name in legal}
    given = []
    if isinstance(layer.get("sampling_by_rank"), Mapping):  # OmegaConf's own word on it names no key
        raise ConfigError(f"{source}: sampling_by_rank is a list of sections: [{{temperature: 0.2}}, ...]")
    for section, body in dict(layer).items():
        if section in legal or (section not in sections and not isinstance(body, Mapping)):
            given.append(str(section))
        elif not isinstance(body, Mapping):
            raise ConfigError(f"{source}: {section} is a section of keys, not a value: {section}.KEY=VALUE")
        else:
            given += [f"{section}.{key}" for key in body]
    for name in given:
        if name in legal:
            continue
        raise ConfigError(f"{source}: unknown key {name!r}{suggest_name(name, legal, 'keys')}")


def _summarize_error(error: Exception) -> str:
    """The part of a library's message that tells a user something: what is wrong, and at which key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [lines[0]] if lines else [type(error).__name__]
    for line in lines[1:]:
        if line.startswith("full_key:"):
            kept.append(f"at {line.removeprefix('full_key:').strip()}")
        elif line.startswith("in ") or "line " in line:
            kept.append(line)
    return ", ".join(kept)
