"""Check a run directory, finished or not: `dpgen verify RUN_DIR`.

Lines for people are plain text with a label in front, so that they can be piped and searched; `--json` is for programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpgen.commands.arguments.parser import complete_directories
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, DpgenError
from dpgen.formatting import format_count

if TYPE_CHECKING:
    from dpgen.output.verification import VerificationReport

_DESCRIPTION = """\
Check a run directory, finished or not: run.json, the journal's checksums, and which rows are missing, doubled or
failed. Of a finished run also check that the dataset holds every row once, in input order, equal to the journal and
the input. Nothing is changed.
"""

_EPILOG = "exit status: 0 for a complete, sound result, 1 for anything else, 2 for wrong usage"

_VERDICTS = {
    "sound": "complete and sound",
    "unfinished": "unfinished: rerun the same command to resume",
    "not sound": "NOT SOUND",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments, description and exit statuses to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    complete_directories(parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of one run"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines for people")
    parser.add_argument("--no-input", dest="check_input", action="store_false", help="do not read the input")


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from dpgen.output.verification import verify

    path = Path(options.run_dir).expanduser()
    if not path.is_dir():
        print(f"dpgen verify: RUN_DIR={path}: there is no such directory", file=sys.stderr)
        return EXIT_USAGE
    try:
        report = verify(path, check_input=options.check_input)
    except DpgenError as error:
        print(f"dpgen: error: {redact_text(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    if options.json:
        print(json.dumps({"verdict": report.verdict, **dataclasses.asdict(report)}))
    else:
        print("\n".join(_format_text(report)))
    return EXIT_OK if report.verdict == "sound" else EXIT_FAILED


def _format_text(report: VerificationReport) -> Iterator[str]:
    from dpgen.formatting import truncate_ranges

    total = "unknown" if report.num_rows is None else f"{report.num_rows:,}"
    yield f"{report.run_dir}: {report.num_done:,} of {total} rows done, {report.num_failed:,} of them with an error"
    yield f"  journal   {format_count(report.num_segments, 'segment')}, {len(report.damaged_segments)} damaged"
    for name, num_bytes in report.torn_segments.items():
        yield f"            {name}: a crash cut off its last {num_bytes:,} bytes (harmless)"
    if report.missing:
        yield f"  missing   {truncate_ranges(report.missing)}"
    if report.doubled:
        yield f"  doubled   {truncate_ranges(report.doubled)} (one result counts)"
    for type, rows in report.failed.items():
        yield f"  failed    {type}: {truncate_ranges(rows)}"
    if report.num_dataset_rows is not None:
        yield f"  dataset   {format_count(report.num_dataset_rows, 'row')}"
    yield f"  input     {report.input}"
    yield from (f"  note      {note}" for note in report.notes)
    yield from (f"  problem   {problem}" for problem in report.problems)
    yield _VERDICTS[report.verdict]
