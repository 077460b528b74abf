"""Make a checked `Config` of a call's keywords: the same keys as in a file, checked by the same loader.

Precedence, lowest first: defaults, `config=`, the keywords of a Session, the keywords of the call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from dpgen.config.completion_checks import CheckConfig
from dpgen.config.program import ProgramConfig
from dpgen.config.schema import Config
from dpgen.config.sections import (
    MISSING,
    DataConfig,
    OutputConfig,
    ParallelConfig,
    RunConfig,
    WorkConfig,
)
from dpgen.errors import ConfigError, suggest_name

PLACEHOLDER = "(temporary)"  # stands for a folder that is not chosen yet

# Keywords for single keys.
_KEYS = {
    "prompt_column": "data.prompt_column",
    "messages_column": "data.messages_column",
    "template": "data.template",
    "as_chat": "data.as_chat",
    "system_prompt": "data.system_prompt",
    "columns": "data.columns",
    "seed": "run.seed",
    "run_dir": "run.dir",
}


class Settings(TypedDict, total=False):
    """List the keywords of a call beside its own arguments; `dpgen run --help` explains each key.

    `prompt_column`, `messages_column`, `template`, `as_chat`, `system_prompt` and `columns` are keys of `data`, and
    `seed` is `run.seed`. The others but `task` are whole sections: a mapping of their keys, or the section's own class.
    """

    prompt_column: str
    messages_column: str
    template: str
    as_chat: bool
    system_prompt: str
    columns: Sequence[str]
    seed: int | None
    task: str
    sampling: Mapping[str, Any]
    sampling_by_rank: Sequence[Mapping[str, Any]]
    engine: Mapping[str, Any]
    lora: Mapping[str, str]
    data: Mapping[str, Any] | DataConfig
    run: Mapping[str, Any] | RunConfig
    parallel: Mapping[str, Any] | ParallelConfig
    work: Mapping[str, Any] | WorkConfig
    output: Mapping[str, Any] | OutputConfig
    check: Mapping[str, Any] | CheckConfig
    program: Mapping[str, Any] | ProgramConfig


class JobSettings(Settings, total=False):
    """List the keywords of a call that starts its own ranks.

    `num_gpus` starts as many ranks on this machine as share these GPUs; without it there is one, or torchrun's or
    srun's. `quiet` keeps the ranks' log lines off stderr.
    """

    num_gpus: int
    quiet: bool


ConfigSource = str | Path | Config | Sequence[str | Path]
Layer = tuple[str, Mapping[str, Any] | None]


def load_config(config: ConfigSource, overrides: Sequence[str] = ()) -> Config:
    """Return the checked configuration of YAML files, as `dpgen run` reads them.

    Args:
        config: a file, or several that are merged from left to right.
        overrides: "key=value" texts, merged over the files.

    Raises:
        ConfigError: all mistakes at once.

    Example:
        >>> import dpgen
        >>> config = dpgen.load_config("conf/demo.yaml", ["sampling.max_tokens=5"])
        >>> config.sampling["max_tokens"], config.data.prompt_column
        (5, 'question')
    """
    from dpgen.config.loader import load, load_values

    if isinstance(config, Config):
        return load_values(list_layers(config))
    files = [config] if isinstance(config, str | Path) else config
    return load([str(path) for path in files], list(overrides))


def list_layers(config: ConfigSource | None) -> list[Layer]:
    """Return the layers that `config=` stands for."""
    if config is None:
        return []
    if isinstance(config, Config):
        from dpgen.config.text_files import escape_file_name

        sections = _to_plain(config, "config")
        sections["data"] = {key: escape_file_name(key, value) for key, value in sections["data"].items()}
        return [("config", sections)]
    files = [config] if isinstance(config, str | Path) else config
    return [(str(path), None) for path in files]


def make_layer(name: str, keywords: Mapping[str, Any], legal: Iterable[str]) -> Layer:
    """Return the layer of a call's keywords, without those that are None.

    Args:
        name: of the function, for messages.
        legal: the keywords that it takes.

    Raises:
        ConfigError: a keyword is unknown, given twice, or holds no section; all of them at once.
    """
    legal = list(legal)
    mistakes: list[str] = []
    layer: dict[str, Any] = {}
    shorts: dict[str, Any] = {}
    for keyword, value in keywords.items():
        if keyword not in legal:
            mistakes.append(_describe_unknown(name, keyword, legal))
        elif keyword in _KEYS:
            if value is not None or keyword == "seed":
                shorts[keyword] = value
        elif value is not None:
            try:
                layer[keyword] = _to_plain(value, keyword)
            except ConfigError as error:
                mistakes += error.mistakes
    for keyword, value in shorts.items():
        section, _, key = _KEYS[keyword].partition(".")
        body = layer.setdefault(section, {})
        if isinstance(body, dict):
            if key in body:
                mistakes.append(f"{name}(): {keyword} is given twice, also as {section}={{{key!r}: ...}}")
            body[key] = _to_plain(value, keyword)
    if mistakes:
        raise ConfigError(*mistakes)
    return f"{name}()", layer


def _describe_unknown(name: str, keyword: str, legal: Sequence[str]) -> str:
    from dpgen.config.options import legal_keys
    from dpgen.config.vllm.vllm_fields import describe_home_of_field

    keys = [key for key, _, _ in legal_keys()]
    if (home := describe_home_of_field(keyword, keys)) and keyword not in _KEYS:
        return f"{name}(): unknown argument {keyword!r}{home}"
    if key := next((key for key in keys if key.endswith(f".{keyword}")), None):
        section, _, rest = key.partition(".")
        return f"{name}(): unknown argument {keyword!r}; write {section}={{{rest!r}: ...}}"
    return f"{name}(): unknown argument {keyword!r}{suggest_name(keyword, legal, 'arguments')}"


def _to_plain(value: Any, place: str) -> Any:
    """Return a value as a YAML file would hold it.

    Args:
        place: where it stands, for messages.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _to_plain(item, f"{place}.{name}") for name, item in fields.items() if not _is_missing(item)}
    if isinstance(value, Mapping):
        return {str(name): _to_plain(item, f"{place}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_to_plain(item, f"{place}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_json_schema"):  # a Pydantic model
        return value.model_json_schema()
    if callable(value):
        return _find_import_path(value, place)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of NumPy
        return value.item()
    return value


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def _find_import_path(function: Callable[..., Any], place: str) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__", "builtins") or not name or "<" in name:
        raise ConfigError(
            f"{place}: {name or function!r} can't be imported by the rank processes: put it into a module of its own, "
            "and give the function, or 'module:function'"
        )
    return f"{module}:{name}"
