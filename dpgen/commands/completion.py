"""Print shell completion scripts, made by shtab from the parser (`dpgen --print-completion SHELL`)."""

from __future__ import annotations

import argparse
import sys

from dpgen.errors import EXIT_OK, EXIT_USAGE


def print_completion(parser: argparse.ArgumentParser, shell: str) -> int:
    """Print the script on stdout and return the exit status: 2 where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        print("dpgen: --print-completion needs shtab: pip install 'dpgen[completion]'", file=sys.stderr)
        return EXIT_USAGE
    print(shtab.complete(parser, shell=shell))
    return EXIT_OK
