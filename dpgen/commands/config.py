"""Show a configuration as `dpgen run` resolves it, with where each value comes from: `dpgen config CONFIG.yaml`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpgen.commands.arguments.parser import CommandParser, complete_configuration
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from dpgen.config.schema import Config

_USAGE = "dpgen config CONFIG.yaml [MORE.yaml ...] [key=value ...] [--json]\n       dpgen config --schema"

_DESCRIPTION = """\
Check a configuration, and print it as dpgen run resolves it: every key with its value, and where that comes from, the
file and line, the command line, or the default. The output is YAML that dpgen run takes. Secrets are left out.

  dpgen config conf.yaml data.limit=10
  dpgen config --schema > config.schema.json     the JSON Schema of configuration files, for editors
"""

_EPILOG = """\
An editor with the YAML language server checks and completes a file that begins with
  # yaml-language-server: $schema=config.schema.json

exit status: 0 done, 2 wrong usage or configuration"""

_DEFAULT, _COMMAND_LINE = "default", "command line"


def add_arguments(parser: CommandParser) -> None:
    """Declare the command line of `dpgen config`."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
    complete_configuration(
        parser.add_argument("configuration", nargs="*", metavar="CONFIG.yaml | key=value", help="as for dpgen run")
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: key → {value, from}")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of configuration files instead")


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    try:
        print("\n".join(_iter_output(options)))
    except ConfigError as error:
        print(f"dpgen config: {redact_text(str(error))}", file=sys.stderr)
        return error.exit_status
    return EXIT_OK


def _iter_output(options: argparse.Namespace) -> Iterator[str]:
    if options.schema:
        from dpgen.config.json_schema import build_json_schema

        if options.configuration:
            raise ConfigError("--schema is that of all configurations: give no CONFIG.yaml with it")
        yield json.dumps(build_json_schema(), indent=2, ensure_ascii=False)
        return
    if not options.configuration:
        raise ConfigError("no configuration; usage: dpgen config CONFIG.yaml [key=value ...]")
    from dpgen.config.loader import load_with_places

    config, places = load_with_places(options.configuration)
    if options.json:
        yield json.dumps({".".join(path): entry for path, entry in _list_entries(config, places).items()})
    else:
        yield from _format_yaml(_list_entries(config, places))


def _list_entries(config: Config, places: Mapping[str, str | None]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return each key, as (section,) or (section, name), with its value and where that comes from.

    The fields of `engine`, `lora` and `sampling` are keys of their own.
    """
    from dpgen.config.schema import to_sections

    entries: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, body in to_sections(config).items():
        if isinstance(body, dict) and body:
            entries |= {(name, key): _describe(value, f"{name}.{key}", places) for key, value in body.items()}
        else:
            entries[name,] = _describe(body, name, places)
    return entries


def _describe(value: Any, key: str, places: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a value, and where it comes from; parts of it may come from elsewhere."""
    inner = {place or _COMMAND_LINE for name, place in places.items() if name.startswith(f"{key}.")}
    if key in places:
        inner.add(places[key] or _COMMAND_LINE)
    is_nested = isinstance(value, (dict, list))
    own = places.get(key) or _COMMAND_LINE if key in places else _DEFAULT
    others = sorted(inner - {own}) if is_nested and isinstance(value, dict) else []
    sources = others if own == _DEFAULT and others else [own, *others]
    return {"value": value, "from": ", ".join(sources)}


def _format_yaml(entries: Mapping[tuple[str, ...], dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a YAML file, in which a comment follows each value or, where it has several lines, its key."""
    from dpgen.config.yaml import yaml12

    section = ""
    for path, entry in entries.items():
        if len(path) > 1 and path[0] != section:
            section = path[0]
            yield f"{section}:"
        indent = "  " * (len(path) - 1)
        first, *others = yaml12.dump({path[-1]: entry["value"]}).rstrip("\n").split("\n")
        if others:
            yield f"{indent}# {entry['from']}"
            yield from (f"{indent}{line}" for line in (first, *others))
        else:
            yield f"{indent}{first}  # {entry['from']}"
