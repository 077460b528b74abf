"""Write the report on a run: `dpgen report RUN_DIR`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from dpgen.commands.arguments.parser import CommandParser, complete_directories, complete_files
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_OK, EXIT_USAGE, DpgenError

_DESCRIPTION = """\
Write one page on a run, RUN_DIR/report.html: throughput, a timeline of every rank, where the time went, lengths and
latencies, errors, retries, duplicates, a few rows to look at, and the configuration.

The run may be finished, live, stopped or dead, and of an older version; the page says what is missing then. A run
writes its report itself when it ends. The page needs no network and has no script. It holds rows of the run: share it
as you would share these.
"""

_EPILOG = "exit status: 0 written, 1 it can't be written, 2 wrong usage, or no run"


def add_arguments(parser: CommandParser) -> None:
    """Declare the command line of `dpgen report`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    complete_directories(parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of one run"))
    complete_files(
        parser.add_argument(
            "-o", "--output", metavar="FILE", help="where to write it (default: RUN_DIR/report.html); replaces the file"
        )
    )


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from dpgen.journal.run_dir import RunDir
    from dpgen.report.facts import has_run
    from dpgen.report.writing import write_report

    path = Path(options.run_dir).expanduser()
    if not has_run(path):
        what = "holds no run" if path.is_dir() else "there is no such directory"
        print(f"dpgen report: RUN_DIR={path}: {what}", file=sys.stderr)
        return EXIT_USAGE
    target = RunDir(str(path)).report if options.output is None else Path(options.output).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        what = "is a directory" if target.is_dir() else f"there is no directory {target.parent}"
        print(f"dpgen report: --output={target}: {what}", file=sys.stderr)
        return EXIT_USAGE
    try:
        write_report(path, target, sleep=time.sleep)
    except DpgenError as error:
        print(f"dpgen report: {redact_text(str(error))}", file=sys.stderr)
        return error.exit_status
    print(target)
    return EXIT_OK
