"""Run `dpgen run` in one process; `dpgen.rank_process` does what a rank does."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dpgen.commands.arguments.parser import CommandParser, complete_configuration
from dpgen.errors import ConfigError, find_nearest_name
from dpgen.rank_process import RankSteps, run_rank

if TYPE_CHECKING:
    from dpgen.config.schema import Config

_USAGE = "dpgen run CONFIG.yaml [MORE.yaml ...] [key=value ...]"

_DESCRIPTION = """\
Generate every row of a dataset that has no result yet, and write the final dataset.

  torchrun --nproc-per-node N -m dpgen run ...    N ranks on this machine
  srun -n N python -m dpgen run ...               N ranks from SLURM
  dpgen run ...                                   one rank

YAML files are merged from left to right, then key=value. The same command resumes an unfinished run, on any number of
ranks.

exit status: 0 done, 2 wrong usage or configuration, 75 stopped but resumable, 1 anything else
"""


def add_arguments(parser: CommandParser) -> None:
    """Declare the command line of `dpgen run`."""
    parser.usage, parser.description = _USAGE, _DESCRIPTION
    parser.make_epilog = format_config_help
    parser.set_defaults(accepts_unknown=True)  # and reports unknown options once for all ranks
    complete_configuration(
        parser.add_argument(
            "configuration",
            nargs="*",
            metavar="CONFIG.yaml | key=value",
            help="YAML files, and keys with their values; a key may be given in either",
        )
    )
    parser.add_argument("--dry-run", action="store_true", help="show what the run will do, as dpgen preview, and stop")


def main(options: argparse.Namespace) -> int:
    """Run this process's rank and return its exit status."""
    steps = RankSteps(replace_run=_show_preview if options.dry_run else None)
    return run_rank(lambda: _load_config(options), options.arguments, steps)


def format_config_help() -> str:
    """Return every configuration key with its default and meaning, one section after the other."""
    from dpgen.config.options import legal_keys
    from dpgen.config.sections import MISSING

    lines = []
    section = ""
    for name, default, help in legal_keys():
        if name.partition(".")[0] != section:
            section = name.partition(".")[0]
            lines.append("")
        lines.append(f"  {name}  ({'required' if default == MISSING else json.dumps(default)})")
        lines += textwrap.wrap(help, width=100, initial_indent="      ", subsequent_indent="      ")
    return "keys, with their defaults:\n" + "\n".join(lines)


def _load_config(options: argparse.Namespace) -> Config:
    if options.unknown:
        raise ConfigError(_describe_unknown_option(options.unknown))
    if not options.configuration:
        raise ConfigError(f"no configuration; usage: {_USAGE}")
    from dpgen.config.loader import load_from_args

    return load_from_args(options.configuration)


def _show_preview(config: Config, num_ranks: int) -> None:
    from dpgen.commands.preview_job import print_preview
    from dpgen.monitoring.preview import PreviewOptions

    print_preview(config, PreviewOptions(num_ranks=num_ranks))


def _describe_unknown_option(unknown: Iterable[str]) -> str:
    """Return the error for an option: `dpgen run` has few, so a configuration key is likely meant."""
    from dpgen.config.options import legal_keys

    option = next(argument for argument in unknown if argument.startswith("-"))
    names = ["dry-run", *(name for name, _, _ in legal_keys())]
    nearest = find_nearest_name(option.strip("-").partition("=")[0], names)
    meant = "--dry-run" if nearest == "dry-run" else f"{nearest}=VALUE"
    hint = f", did you mean {meant}?" if nearest else ";"
    return f"unknown option {option}{hint} see dpgen run --help"
