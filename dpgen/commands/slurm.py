"""Print the sbatch script for a configuration, or submit it: `dpgen slurm`.

- The scripts are the shipped launch/slurm.sbatch and launch/slurm_torchrun.sbatch, which are links to the ones beside
  this file. The command fills in their #SBATCH lines and their arguments.
- The configuration is checked here, before a job waits in a queue.
- Every long option that is not the command's own is sbatch's, including those of a site's plugins, so a fixed list of
  legal options is impossible. `parse_args` therefore reads the arguments itself, and argparse makes the help.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpgen.commands.arguments.parser import CommandParser, complete_configuration
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ConfigError, find_nearest_name

if TYPE_CHECKING:
    from dpgen.config.schema import Config

_USAGE = """\
dpgen slurm CONFIG.yaml [MORE.yaml ...] [key=value ...] [--torchrun] [--submit] [--SBATCH-OPTION [VALUE] ...]"""

_DESCRIPTION = """\
Print the sbatch script that runs a configuration, to read, edit or pipe into sbatch. Files and key=value are those of
`dpgen run`, and are checked. Every other option is sbatch's, in its long form, and becomes a line of the script:

  dpgen slurm conf.yaml --nodes 4 --gpus-per-node 8 --time 4:00:00 --partition gpu
  dpgen slurm conf.yaml run.dir=runs/b --nodes 4 --gpus-per-node 8 | sbatch

--ntasks-per-node is the number of ranks on a node. Its default is the node's GPUs divided by those of one rank
(parallel.tensor_parallel_size x parallel.pipeline_parallel_size). The script uses the Python that runs this command.
Paths in the configuration are relative to the directory that the script is submitted from.

If a time limit or a preemption ends the run before it is complete, the job requeues itself.
"""

_EPILOG = "exit status: 0 done, 2 wrong usage or configuration, 1 if sbatch rejects the job"

_CONFIG_PLACEHOLDER = "# dpgen slurm: the configuration goes here\n"
_OWN_FLAGS = ("--submit", "--torchrun", "--help")
# sbatch's options that take no value, or one after "=" alone: the argument after them is something else.
_SBATCH_FLAGS = {
    *("contiguous", "exclusive", "get-user-env", "hold", "no-kill", "no-requeue", "overcommit", "oversubscribe"),
    *("parsable", "propagate", "quiet", "reboot", "requeue", "spread-job", "test-only", "use-min-nodes", "verbose"),
    "wait",
}


@dataclass
class SlurmCommand:
    """The parts of a command line.

    Attributes:
        options: sbatch's options, without dashes: name → value, or None for a flag.
    """

    configuration: list[str] = field(default_factory=list)
    options: dict[str, str | None] = field(default_factory=dict)
    use_torchrun: bool = False
    submit: bool = False


def add_arguments(parser: CommandParser) -> None:
    """Declare the command line of `dpgen slurm`."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
    parser.set_defaults(accepts_unknown=True)  # sbatch's options
    complete_configuration(
        parser.add_argument("configuration", nargs="*", metavar="CONFIG.yaml | key=value", help="as for dpgen run")
    )
    parser.add_argument("--torchrun", action="store_true", help="one torchrun per node, not one srun task per rank")
    parser.add_argument("--submit", action="store_true", help="submit the script, and show sbatch's answer")


def main(options: argparse.Namespace) -> int:
    """Print or submit the script, and return the exit status."""
    try:
        script, submit = script_for(options.arguments)
    except ConfigError as error:
        print(f"dpgen slurm: {redact_text(str(error))}", file=sys.stderr)
        return EXIT_USAGE
    if keys := _find_secret_keys(options.arguments):
        message = f"the script holds secrets in clear text: {', '.join(keys)}. Set variables (HF_TOKEN, ...) instead"
        print(f"dpgen slurm: {message}", file=sys.stderr)
    if not submit:
        print(script, end="")
        return EXIT_OK
    try:
        return EXIT_FAILED if subprocess.run(["sbatch"], input=script, text=True).returncode else EXIT_OK
    except FileNotFoundError:
        message = "there is no sbatch here. Without --submit the script is printed, to be submitted elsewhere"
        print(f"dpgen slurm: {message}", file=sys.stderr)
        return EXIT_FAILED


def script_for(arguments: Sequence[str], python: str = sys.executable) -> tuple[str, bool]:
    """Return the script that a command line requests, and True if it is to be submitted.

    Raises:
        ConfigError: wrong usage or configuration.
    """
    from importlib.resources import files

    from dpgen.config.loader import load_from_args

    command = parse_args(arguments)
    if not command.configuration:
        raise ConfigError("no configuration; usage: dpgen slurm CONFIG.yaml [key=value ...] [--nodes N ...]")
    config = load_from_args(command.configuration)
    template = "slurm_torchrun.sbatch" if command.use_torchrun else "slurm.sbatch"
    text = (files("dpgen.commands") / template).read_text(encoding="utf-8")
    options = {**command.options, **ranks_per_node(config, command.options)}
    return fill_template(text, options, command.configuration, python), command.submit


def parse_args(arguments: Sequence[str]) -> SlurmCommand:
    """Split a command line into the configuration, the command's own flags, and sbatch's options.

    Raises:
        ConfigError: an option in its short form, or without its value.
    """
    command, remaining = SlurmCommand(), list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("-"):
            command.configuration.append(argument)
        elif not argument.startswith("--"):
            raise ConfigError(f"{argument}: write sbatch's options in their long form, as --nodes for -N")
        elif argument in ("--submit", "--torchrun"):
            command.submit |= argument == "--submit"
            command.use_torchrun |= argument == "--torchrun"
        else:
            name, equals, value = argument[2:].partition("=")
            if not equals and name not in _SBATCH_FLAGS:
                if not remaining or remaining[0].startswith("--"):
                    raise ConfigError(_describe_missing_value(argument))
                equals, value = "=", remaining.pop(0)
            command.options[name] = value if equals else None
    return command


def ranks_per_node(config: Config, options: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return --ntasks-per-node if it follows from a node's GPUs; nothing if it was given and agrees with the GPUs.

    Raises:
        ConfigError: a node has too few GPUs for one rank, or the given number of ranks does not fit them.
    """
    gpus, gpus_per_rank = _gpus_per_node(options), config.gpus_per_rank
    given = options.get("ntasks-per-node")
    if gpus is None or config.parallel.share_devices:
        return {}
    num_ranks = gpus // gpus_per_rank
    if not num_ranks:
        raise ConfigError(
            f"one rank needs {gpus_per_rank} GPUs (tensor_parallel_size x pipeline_parallel_size), "
            f"and a node gives {gpus}"
        )
    if given is not None and given.isdigit() and int(given) != num_ranks:
        raise ConfigError(
            f"--ntasks-per-node={given}: {gpus} GPUs a node make {num_ranks} ranks of {gpus_per_rank}: "
            f"give {num_ranks}, or leave the option out"
        )
    return {"ntasks-per-node": str(num_ranks)} if given is None else {}


def fill_template(text: str, options: Mapping[str, str | None], configuration: Sequence[str], python: str) -> str:
    """Return a shipped script with its #SBATCH lines and its arguments filled in."""
    remaining = dict(options)
    lines = []
    for line in text.splitlines(keepends=True):
        match = re.match(r"#SBATCH --([\w-]+)", line)
        if match and match[1] in remaining:
            line = _directive(match[1], remaining.pop(match[1]))
        elif match and match[1] == "requeue" and "no-requeue" in remaining:
            continue
        elif line == "set -uo pipefail\n":  # the first line that is no comment: sbatch reads no further
            lines += [_directive(name, value) for name, value in remaining.items()]
        elif line == _CONFIG_PLACEHOLDER:
            line = f"DPGEN_PYTHON=${{DPGEN_PYTHON:-{shlex.quote(python)}}}\n"
            line += f"(($#)) || set -- {shlex.join(configuration)}\n"
        lines.append(line)
    return "".join(lines)


def _find_secret_keys(arguments: Sequence[str]) -> list[str]:
    """Return the keys of the command line whose values look like secrets."""
    import yaml

    from dpgen.config.secrets import has_secret

    keys = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if equals and not key.startswith("-") and has_secret(value, key.rpartition(".")[2]):
            keys.append(key)
    return keys


def _gpus_per_node(options: Mapping[str, str | None]) -> int | None:
    """Read ``--gpus-per-node=8``, ``--gpus-per-node=a100:8`` or ``--gres=gpu:a100:8``; None if neither is given."""
    text = options.get("gpus-per-node")
    if text is None:
        gpus = [part for part in (options.get("gres") or "").split(",") if part.split(":")[0] == "gpu"]
        text = gpus[0].removeprefix("gpu").removeprefix(":") or "1" if gpus else None
    if text is None:
        return None
    number = text.rpartition(":")[2]
    return int(number) if number.isdigit() else 1  # `--gres=gpu:a100` is one


def _describe_missing_value(option: str) -> str:
    nearest = find_nearest_name(option, _OWN_FLAGS)
    hint = f", or did you mean {nearest}?" if nearest else ";"
    return f"{option} needs a value, as in {option}=VALUE{hint} see dpgen slurm --help"


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}") + "\n"
