"""Build the command line's parser and dispatch to one command.

- A command is a module `dpgen.commands.NAME` with `add_arguments(parser)` and `main(options)`, which returns the exit
  status. Only the command that is given is imported, and its `main` imports what it needs, so `--help` is instant.
- Files, options and key=value stand in any order.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from importlib import import_module

from dpgen.commands.arguments.parser import CommandParser, describe_unknown
from dpgen.errors import EXIT_OK, EXIT_USAGE

COMMANDS = {
    "run": "generate every row of a dataset that has no result yet",
    "run-batch": "answer an OpenAI batch file, with the flags of vllm run-batch",
    "preview": "show what a run will do: prompts, token counts, failing rows, an estimate",
    "config": "show a configuration as it resolves, with where each value comes from",
    "status": "show how a run is, from any shell",
    "report": "write a page on a run, with charts",
    "verify": "check a run directory, complete or not",
    "export": "write a run's rows as Parquet, JSON lines, CSV or a dataset of the Hub",
    "slurm": "print the sbatch script for a configuration, or submit it",
    "tune": "find the settings with which a job runs fastest, on its own rows",
    "simulate": "estimate how long a run takes, and on how many ranks",
}

_DESCRIPTION = """\
Generate with an LLM over a whole dataset, data-parallel.

  torchrun --nproc-per-node N -m dpgen run CONFIG.yaml ...    N ranks on this machine
  srun -n N python -m dpgen run CONFIG.yaml ...               N ranks from SLURM
  dpgen run CONFIG.yaml ...                                   one rank
"""

_EPILOG = """\
'dpgen COMMAND --help' shows a command's options, 'dpgen run --help' every configuration key.

exit status: 0 done, 2 wrong usage or configuration, 75 stopped but resumable, 1 anything else;
after Ctrl-C 75 of run, run-batch and tune, 130 of other commands
"""


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    try:
        if argv and argv[0] in COMMANDS:
            return _run_command(argv[0], argv[1:])
        return _run_without_command(argv)
    except SystemExit as exited:  # argparse, after printing help or an error
        return int(exited.code or EXIT_OK)


def build_parser(*names: str) -> tuple[CommandParser, dict[str, CommandParser]]:
    """Return the parser of `dpgen` and those of its commands; only the named commands are imported."""
    parser = CommandParser("dpgen", usage="dpgen COMMAND ...", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "fish", "tcsh"),
        metavar="SHELL",
        help="print a completion script for bash, zsh, fish or tcsh, and exit",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", prog="dpgen")
    commands = {name: subparsers.add_parser(name, help=text) for name, text in COMMANDS.items()}
    for name in names:
        module = import_module(f"dpgen.commands.{name.replace('-', '_')}")
        commands[name].set_defaults(main=module.main, accepts_unknown=False)
        module.add_arguments(commands[name])
    return parser, commands


def _run_command(name: str, arguments: Sequence[str]) -> int:
    parser = build_parser(name)[1][name]
    options, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown and not options.accepts_unknown:
        parser.reject_unknown(unknown)
    options.arguments, options.unknown = list(arguments), unknown
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # commands clean up; see `dpgen.__main__`
    status: int = options.main(options)
    return status


def _run_without_command(argv: Sequence[str]) -> int:
    parser = build_parser()[0]
    if not argv or argv[0] == "help":
        parser.print_help()
        return EXIT_OK if argv else EXIT_USAGE
    if not argv[0].startswith("-"):
        parser.error(describe_unknown("command", argv[0], COMMANDS))
    if not parser.has_option(argv[0]):
        parser.reject_unknown(argv)
    options = parser.parse_args(list(argv))
    if options.version:
        from importlib.metadata import version

        print(f"dpgen {version('dpgen')}")
        return EXIT_OK
    if options.print_completion:
        from dpgen.commands.arguments.completion import print_completion

        return print_completion(build_parser(*COMMANDS)[0], options.print_completion)
    parser.error("the command must come first")
