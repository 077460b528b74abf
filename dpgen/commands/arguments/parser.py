"""Parse command lines: argparse with one-line errors, and help that is made only when it is printed.

- Wrong usage ends with status 2 and one line that names the nearest legal option and the help to read.
- Options are written in full: an abbreviation would change its meaning when an option is added.
- Importing this module loads nothing but argparse, so that `--help` stays under 0.1 s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from dpgen.errors import EXIT_USAGE, find_nearest_name


class CommandParser(argparse.ArgumentParser):
    """Parse the arguments of `dpgen`, or of one of its commands.

    Attributes:
        make_epilog: returns the text below the options when the help is printed; None for no text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **kwargs}
        super().__init__(*args, **settings)
        self.make_epilog: Callable[[], str] | None = None

    def format_help(self) -> str:
        return super().format_help() + ("" if self.make_epilog is None else f"\n{self.make_epilog()}\n")

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with status 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: {self.add_help_hint(message)}\n")

    def has_option(self, argument: str) -> bool:
        """Return True if the argument is one of the parser's options, with or without ``=VALUE``."""
        return argument.partition("=")[0] in self._option_string_actions

    def reject_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """Exit like `error` because of arguments that the parser did not take."""
        options = [argument for argument in unknown if argument.startswith("-")]
        if not options:
            self.error(f"unexpected argument {unknown[0]!r}")
        self.error(describe_unknown("option", options[0].partition("=")[0], self._option_string_actions))

    def add_help_hint(self, message: str) -> str:
        """Return the message with the command that prints the help."""
        return f"{message}{'' if message.endswith('?') else ';'} see {self.prog} --help"


def describe_unknown(kind: str, name: str, legal: Collection[str]) -> str:
    """Return ``unknown option --jsn, did you mean --json?``; the question only if a legal name is near."""
    by_bare_name = {legal_name.lstrip("-"): legal_name for legal_name in legal}  # dashes make all options look near
    nearest = find_nearest_name(name.lstrip("-"), by_bare_name)
    return f"unknown {kind} {name}" + (f", did you mean {by_bare_name[nearest]}?" if nearest else "")


def complete_files(argument: argparse.Action) -> None:
    """Let shells complete the argument by file names; shtab reads the attribute (`dpgen --print-completion`)."""
    argument.complete = {  # type: ignore[attr-defined]
        "bash": "_shtab_compgen_files",
        "zsh": "_files",
        "fish": "(__fish_complete_path (commandline -ct))",
        "tcsh": "f",
    }


def complete_directories(argument: argparse.Action) -> None:
    """Let shells complete the argument by directory names, as `complete_files` does by file names."""
    argument.complete = {  # type: ignore[attr-defined]
        "bash": "_shtab_compgen_dirs",
        "zsh": "_files -/",
        "fish": "(__fish_complete_directories)",
        "tcsh": "d",
    }


def complete_configuration(argument: argparse.Action) -> None:
    """Let shells complete the argument by file names, and by keys and their values; see `completion`."""
    argument.complete = {  # type: ignore[attr-defined]
        "bash": "_shtab_compgen_files",
        "zsh": "_dpgen_configuration",
        "fish": "(_dpgen_configuration)",
        "tcsh": "f",
    }
