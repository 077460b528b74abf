"""Read the command line of `dpgen run-batch`: vLLM's flags, and dpgen's YAML files and key=value.

Every flag becomes ``key=value`` of the configuration, so that the loader checks its value as any other. A flag's
value stands for itself, as in vLLM: no path is a list, and no `${` an interpolation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dpgen.commands.arguments.parser import describe_unknown
from dpgen.config.checks import find_scheme
from dpgen.config.options import find_type
from dpgen.config.vllm import vllm_flags as flags
from dpgen.config.yaml.layers import make_literal
from dpgen.errors import ConfigError

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])")
_FACTORS = {letter: 1000**power for power, letter in enumerate("kmgt", 1)}
_FACTORS |= {letter: 1024**power for power, letter in enumerate("KMGT", 1)}
_OWN = ("run-dir", "help")
_SECTIONS = ("run", "data", "engine", "lora", "sampling", "parallel", "work", "output")


@dataclass
class BatchCommand:
    """Hold what a command line asks for.

    Attributes:
        input_file, output_file: local paths, or addresses that fsspec reads and writes.
        run_dir: the run directory, unless `run.dir` is given as a key.
        overrides: key=value, from the flags.
        configuration: YAML files and key=value, as they were given.
        notes: one sentence each about flags without effect.
    """

    input_file: str = ""
    output_file: str = ""
    run_dir: str = ""
    overrides: list[str] = field(default_factory=list)
    configuration: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        """Return the command line of `dpgen run` that does the same, but for the output file."""
        path = f"./{self.input_file}" if self.input_file.startswith("[") else self.input_file  # a list begins so
        own = [f"data.path={make_literal(path)}", "data.format=openai_batch", "output.format=openai_batch"]
        own.append(f"run.dir={make_literal(self.run_dir or self._find_default_run_dir())}")
        return [*own, *self.overrides, *self.configuration]

    def _find_default_run_dir(self) -> str:
        """Return the run directory next to the response file; for an address, in the working directory."""
        if find_scheme(self.output_file) is None:
            return f"{self.output_file}.run"
        return f"{self.output_file.partition('?')[0].rstrip('/').rpartition('/')[2]}.run"


def parse_batch_flags(arguments: Sequence[str]) -> BatchCommand:
    """Return what the arguments after `dpgen run-batch` ask for.

    Raises:
        ConfigError: unknown flags, flags without a value, or that dpgen can't honour; all of them at once.
    """
    command, given, mistakes, remaining = BatchCommand(), dict[str, list[str]](), list[str](), list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("-") or argument == "-":
            command.configuration.append(argument)
            continue
        try:
            name, values = _take_flag(argument, remaining)
        except ConfigError as error:
            mistakes += error.mistakes
            continue
        given[name] = values
    mistakes += _find_refused(given)
    for name, attribute in (("input-file", "input_file"), ("output-file", "output_file"), ("run-dir", "run_dir")):
        value = given.pop(name, [""])[0]
        setattr(command, attribute, value)
        if name == "run-dir" and find_scheme(value) is not None:
            mistakes.append(f"--{name} {value}: must be a local path: rows are synced and files renamed there")
    if not command.input_file or not command.output_file:
        mistakes.append("run-batch needs the batch file and the response file: -i IN.jsonl -o OUT.jsonl")
    if mistakes:
        raise ConfigError(*mistakes)
    command.notes = [
        f"--{name} has no effect: dpgen starts no server" for name in given if _split(name)[0] in flags.IGNORED
    ]
    command.overrides = _to_overrides({name: values for name, values in given.items() if name not in flags.IGNORED})
    return command


def _take_flag(argument: str, remaining: list[str]) -> tuple[str, list[str]]:
    """Return a flag's name, with the path in its value after a dot, and its values, which are taken from `remaining`.

    Raises:
        ConfigError: there is no such flag, or its value is missing.
    """
    written, equals, value = argument.partition("=")
    if match := re.fullmatch(r"-O(\d)", written):
        return "optimization-level", [match[1]]
    head, path = _split(written)
    name = flags.SHORT_FORMS.get(head, head[2:].replace("_", "-") if head.startswith("--") else "")
    is_on = True
    if name.startswith("no-") and name[3:] in flags.SWITCHES:
        name, is_on = name[3:], False
    full = f"{name}.{path}" if path else name
    if name in flags.SWITCHES and not path:
        if equals:
            raise ConfigError(f"{written} takes no value; write --no-{name} for the opposite")
        return full, ["true" if is_on else "false"]
    if name not in flags.LISTS | flags.VALUES and name not in _OWN:
        raise ConfigError(_describe_unknown(written))
    values = [value] if equals else []
    is_list = name in flags.LISTS and not equals
    while remaining and not _is_flag(remaining[0]) and (not values or (is_list and not _is_override(remaining[0]))):
        values.append(remaining.pop(0))
    if not values:
        raise ConfigError(f"{written} needs a value, as in {written} VALUE")
    return full, values


def _find_refused(given: dict[str, list[str]]) -> list[str]:
    """Return a sentence for each flag that dpgen can't honour, and drop those that say what holds anyway."""
    mistakes = []
    for name in [name for name in given if name in flags.REFUSED]:
        values = given.pop(name)
        if values != [flags.DEFAULTS.get(name, "false")]:
            mistakes.append(f"--{name} can't be honoured: {flags.REFUSED[name]}")
    if given.get("enable-auto-tool-choice") == ["true"] and "tool-call-parser" not in given:
        mistakes.append("--enable-auto-tool-choice needs --tool-call-parser NAME")
    for item in given.get("lora-modules", ()):
        if not item.startswith("{") and not re.match(r"[^=]+=.", item):
            mistakes.append(f"--lora-modules {item}: must be NAME=PATH")
    return mistakes


def _to_overrides(given: dict[str, list[str]]) -> list[str]:
    """Return the flags as key=value."""
    overrides = []
    finds_calls = given.pop("enable-auto-tool-choice", ["false"]) == ["true"]
    if (parser := given.pop("tool-call-parser", None)) and finds_calls:
        overrides.append(f"output.tool_parser={parser[0]}")
    if (parser := given.pop("reasoning-parser", None)) and parser[0]:
        name = json.dumps(parser[0])
        overrides += [
            "output.reasoning=split",
            f"output.reasoning_parser={parser[0]}",
            f"engine.reasoning_parser={name}",
        ]
    if modules := given.pop("lora-modules", None):
        overrides.append(f"lora={json.dumps(make_literal(dict(map(_read_adapter, modules))))}")
        if given.get("enable-lora") == ["true"]:
            del given["enable-lora"]
    nested: dict[str, dict[str, object]] = {}
    for full, values in given.items():
        name, path = _split(full)
        if path:
            _insert(nested.setdefault(name, {}), path.split("."), _to_value(name, values[0]))
        else:
            overrides.append(_to_override(name, values))
    overrides += [f"{_find_key(name)}={json.dumps(make_literal(value))}" for name, value in nested.items()]
    return overrides


def _to_override(name: str, values: list[str]) -> str:
    key = _find_key(name)
    if key == "model":
        return f"{key}={make_literal(values[0])}"  # taken as it stands
    if key == "data.chat_template":
        return f"{key}={values[0]}"  # the same, with any ${ in it
    items = [_to_yaml(name, value) for value in values]
    return f"{key}=[{', '.join(items)}]" if name in flags.LISTS else f"{key}={items[0]}"


def _to_yaml(name: str, text: str) -> str:
    if text[:1] in ("{", "[") and name not in flags.TEXTS:
        try:
            return json.dumps(make_literal(json.loads(text)))
        except ValueError:
            return text  # YAML
    return json.dumps(make_literal(_to_value(name, text)))


def _to_value(name: str, text: str) -> object:
    """Return a flag's value as vLLM reads it."""
    if name in flags.SIZES and (match := _SIZE.fullmatch(text)):
        return int(float(match[1]) * _FACTORS[match[2]])
    if name == "max-model-len" and text == "auto":
        return -1
    if name in flags.TEXTS:
        return text
    if name in flags.SWITCHES or text in ("true", "false"):
        return text == "true"
    if text == "None":
        return None
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    if not _NUMBER.fullmatch(text):
        return text
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _read_adapter(item: str) -> tuple[str, str]:
    if item.startswith("{"):
        try:
            module = json.loads(item)
            return str(module["name"]), str(module["path"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--lora-modules {item}: must be JSON with a name and a path") from None
    name, _, path = item.partition("=")
    return name, path


def _find_key(name: str) -> str:
    return flags.KEYS.get(name, f"engine.{name.replace('-', '_')}")


def _insert(values: dict[str, object], path: list[str], value: object) -> None:
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        assert isinstance(inner, dict)
        values = inner
    values[path[-1]] = value


def _split(name: str) -> tuple[str, str]:
    """Return a flag and the path in its value: --compilation-config.mode sets one field of it."""
    head, _, path = name.partition(".")
    return head, path


def _is_flag(argument: str) -> bool:
    return argument.startswith("-") and len(argument) > 1 and not _NUMBER.fullmatch(argument)


def _is_override(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and (bool(find_type(key)) or (key.partition(".")[0] in _SECTIONS and "." in key))


def _describe_unknown(written: str) -> str:
    legal = [f"--{name}" for name in (*flags.SWITCHES, *flags.LISTS, *flags.VALUES, *_OWN)]
    if written == "--config":
        return "--config is not read: give its keys as flags, or a YAML file of dpgen's keys as an argument"
    problem = describe_unknown("option", written, legal)
    if problem.endswith("?"):
        return problem
    field_name = written.strip("-").replace("-", "_")
    return f"{problem}; see dpgen run-batch --help (a field of a newer vLLM's EngineArgs: engine.{field_name}=VALUE)"
