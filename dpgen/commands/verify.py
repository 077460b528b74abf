"""`dpgen verify RUN_DIR`: checks a run folder, finished or not, and says what it found."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, DpgenError
from dpgen.formatting import format_count
from dpgen.output.verification import VerificationReport, truncate_ranges, verify

USAGE = """\
usage: dpgen verify RUN_DIR [--json] [--no-input]

Checks a run folder, finished or not: run.json, the journal's checksums, which rows are missing, doubled or failed,
and, of a finished run, that the dataset holds every row once, in input order, as the journal and the input have it.
Changes nothing.

  --json       one JSON object instead of lines for people
  --no-input   leave the input unread

Exit status: 0 for a complete, sound result, 1 for anything else, 2 for wrong usage.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit status."""
    if "-h" in arguments or "--help" in arguments:
        print(USAGE, end="")
        return EXIT_OK
    unknown = [each for each in arguments if each.startswith("-") and each not in ("--json", "--no-input")]
    paths = [each for each in arguments if not each.startswith("-")]
    if unknown or len(paths) != 1:
        print(f"dpgen verify: {f'unknown option {unknown[0]}' if unknown else 'name one run folder'}", file=sys.stderr)
        print(USAGE, end="", file=sys.stderr)
        return EXIT_USAGE
    path = Path(paths[0]).expanduser()
    if not path.is_dir():
        print(f"dpgen verify: there is no folder {path}", file=sys.stderr)
        return EXIT_USAGE
    try:
        report = verify(path, check_input="--no-input" not in arguments)
    except DpgenError as error:
        print(f"dpgen: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if "--json" in arguments:
        print(json.dumps({"verdict": report.verdict, **dataclasses.asdict(report)}))
    else:
        print("\n".join(_format_text(report)))
    return EXIT_OK if report.verdict == "sound" else EXIT_FAILED


def _format_text(report: VerificationReport) -> Iterator[str]:
    total = "unknown" if report.num_rows is None else f"{report.num_rows:,}"
    yield f"{report.run_dir}: {report.num_done:,} of {total} rows done, {report.num_failed:,} of them with an error"
    yield f"  journal   {format_count(report.num_segments, 'segment')}, {len(report.damaged_segments)} damaged"
    for name, num_bytes in report.torn_segments.items():
        yield f"            {name}: its last {num_bytes:,} bytes were torn off by a crash (harmless)"
    if report.missing:
        yield f"  missing   {truncate_ranges(report.missing)}"
    if report.doubled:
        yield f"  doubled   {truncate_ranges(report.doubled)} (one result counts)"
    for kind, rows in report.failed.items():
        yield f"  failed    {kind}: {truncate_ranges(rows)}"
    if report.num_dataset_rows is not None:
        yield f"  dataset   {format_count(report.num_dataset_rows, 'row')}"
    yield f"  input     {report.input}"
    yield from (f"  note      {note}" for note in report.notes)
    yield from (f"  problem   {problem}" for problem in report.problems)
    yield _VERDICTS[report.verdict]


_VERDICTS = {
    "sound": "complete and sound",
    "unfinished": "unfinished: run the same command again to go on",
    "not sound": "NOT SOUND",
}
