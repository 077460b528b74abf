"""`dpgen slurm CONFIG`: prints the sbatch script for a configuration, or submits it.

The scripts are the shipped launch/slurm.sbatch and launch/slurm_torchrun.sbatch, which lie beside this file; the
command fills in their #SBATCH lines and their arguments.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from dpgen.config.loader import load_from_args
from dpgen.config.schema import Config
from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ConfigError

USAGE = """\
usage: dpgen slurm CONFIG.yaml [MORE.yaml ...] [key=value ...] [--torchrun] [--submit] [--SBATCH-OPTION [VALUE] ...]

Prints the sbatch script that runs a configuration, to read, edit or pipe into sbatch. Files and key=value are those
of `dpgen run`, and are checked. Every other option is sbatch's, in its long form, and becomes a line of the script:

  dpgen slurm conf.yaml --nodes 4 --gpus-per-node 8 --time 4:00:00 --partition gpu
  dpgen slurm conf.yaml run.dir=runs/b --nodes 4 --gpus-per-node 8 | sbatch

  --torchrun   one torchrun on each node, instead of one srun task for each rank
  --submit     submits it; sbatch's answer is shown

--ntasks-per-node is the number of ranks on a node; left out, it is the node's GPUs divided by those of one rank
(parallel.tensor_parallel_size x parallel.pipeline_parallel_size). The script uses the Python that runs this command.
Paths in the configuration are relative to the folder that the script is submitted from.

The job requeues itself when a time limit or a preemption ends a run that is not complete, until it is.

Exit status: 0 done, 2 wrong usage or configuration, 1 if sbatch refuses the job.
"""

_CONFIG_PLACEHOLDER = "# dpgen slurm: the configuration goes here\n"
# sbatch's options that take no value, or one after "=" alone: the word after them is something else.
_SBATCH_FLAGS = {
    "contiguous",
    "exclusive",
    "get-user-env",
    "hold",
    "no-kill",
    "no-requeue",
    "overcommit",
    "oversubscribe",
}
_SBATCH_FLAGS |= {
    "parsable",
    "propagate",
    "quiet",
    "reboot",
    "requeue",
    "spread-job",
    "test-only",
    "use-min-nodes",
    "verbose",
}
_SBATCH_FLAGS |= {"wait"}


@dataclass
class SlurmCommand:
    """A command line, taken apart."""

    configuration: list[str] = field(default_factory=list)
    options: dict[str, str | None] = field(default_factory=dict)  # sbatch's: name → value, or None for a flag
    use_torchrun: bool = False
    submit: bool = False


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit status."""
    if "-h" in arguments or "--help" in arguments:
        print(USAGE, end="")
        return EXIT_OK
    try:
        script, submit = script_for(arguments)
    except ConfigError as error:
        print(f"dpgen slurm: {error}", file=sys.stderr)
        return EXIT_USAGE
    if not submit:
        print(script, end="")
        return EXIT_OK
    try:
        return EXIT_FAILED if subprocess.run(["sbatch"], input=script, text=True).returncode else EXIT_OK
    except FileNotFoundError:
        message = "there is no sbatch here; without --submit the script is printed, to be submitted where there is"
        print(f"dpgen slurm: {message}", file=sys.stderr)
        return EXIT_FAILED


def script_for(arguments: Sequence[str], python: str = sys.executable) -> tuple[str, bool]:
    """The script that a command line asks for, and whether it is to be submitted.

    Raises:
        ConfigError: wrong usage or configuration.
    """
    request = parse_args(arguments)
    if not request.configuration:
        raise ConfigError("no configuration; usage: dpgen slurm CONFIG.yaml [key=value ...] [--nodes N ...]")
    config = load_from_args(request.configuration)
    template = "slurm_torchrun.sbatch" if request.use_torchrun else "slurm.sbatch"
    text = (files("dpgen.commands") / template).read_text(encoding="utf-8")
    options = {**request.options, **ranks_per_node(config, request.options)}
    return fill_template(text, options, request.configuration, python), request.submit


def parse_args(arguments: Sequence[str]) -> SlurmCommand:
    """Takes a command line apart.

    Raises:
        ConfigError: an option in its short form, or without its value.
    """
    request, words = SlurmCommand(), list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            request.configuration.append(word)
        elif not word.startswith("--"):
            raise ConfigError(f"{word}: write sbatch's options in their long form, as --nodes for -N")
        elif word in ("--submit", "--torchrun"):
            request.submit |= word == "--submit"
            request.use_torchrun |= word == "--torchrun"
        else:
            name, equals, value = word[2:].partition("=")
            if not equals and name not in _SBATCH_FLAGS:
                if not words or words[0].startswith("--"):
                    raise ConfigError(f"{word} needs a value, as in {word}=VALUE")
                equals, value = "=", words.pop(0)
            request.options[name] = value if equals else None
    return request


def ranks_per_node(config: Config, options: Mapping[str, str | None]) -> dict[str, str | None]:
    """--ntasks-per-node, where it follows from the GPUs of a node; nothing where it was given, and agrees with them.

    Raises:
        ConfigError: the GPUs can't be shared out to ranks, or not to so many.
    """
    gpus, needed = _gpus_per_node(options), config.gpus_per_rank
    given = options.get("ntasks-per-node")
    if gpus is None or config.parallel.share_devices:
        return {}
    fit = gpus // needed
    if not fit:
        raise ConfigError(
            f"one rank needs {needed} GPUs (tensor_parallel_size x pipeline_parallel_size), and a node gives {gpus}"
        )
    if given is not None and given.isdigit() and int(given) != fit:
        raise ConfigError(
            f"--ntasks-per-node is {given}, and {gpus} GPUs a node make {fit} ranks of {needed}: give {fit}, or nothing"
        )
    return {"ntasks-per-node": str(fit)} if given is None else {}


def _gpus_per_node(options: Mapping[str, str | None]) -> int | None:
    """From ``--gpus-per-node=8``, ``--gpus-per-node=a100:8`` or ``--gres=gpu:a100:8``; None where neither is there."""
    text = options.get("gpus-per-node")
    if text is None:
        gres = [each for each in (options.get("gres") or "").split(",") if each.split(":")[0] == "gpu"]
        text = gres[0].removeprefix("gpu").removeprefix(":") or "1" if gres else None
    if text is None:
        return None
    number = text.rpartition(":")[2]
    return int(number) if number.isdigit() else 1  # `--gres=gpu:a100` is one


def fill_template(text: str, options: Mapping[str, str | None], configuration: Sequence[str], python: str) -> str:
    """A shipped script with its #SBATCH lines and its arguments filled in."""
    left = dict(options)
    lines = []
    for line in text.splitlines(keepends=True):
        match = re.match(r"#SBATCH --([\w-]+)", line)
        if match and match[1] in left:
            line = _directive(match[1], left.pop(match[1]))
        elif match and match[1] == "requeue" and "no-requeue" in left:
            continue
        elif line == "set -uo pipefail\n":  # the first line that is no comment: sbatch reads no further
            lines += [_directive(name, value) for name, value in left.items()]
        elif line == _CONFIG_PLACEHOLDER:
            line = f"DPGEN_PYTHON=${{DPGEN_PYTHON:-{shlex.quote(python)}}}\n"
            line += f"(($#)) || set -- {shlex.join(configuration)}\n"
        lines.append(line)
    return "".join(lines)


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}") + "\n"
