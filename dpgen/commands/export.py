"""Export a run's rows to files or to the Hub: `dpgen export RUN_DIR TARGET`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpgen.commands.arguments.parser import CommandParser, complete_directories, complete_files
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_OK, ConfigError, DpgenError
from dpgen.formatting import format_count

if TYPE_CHECKING:
    from dpgen.output.export.export import ExportReport

_USAGE = """\
dpgen export RUN_DIR TARGET [--format FORMAT] [--columns NAME,...] [--rename OLD=NEW] [--only-successful] [--overwrite]
       dpgen export RUN_DIR --push-to-hub NAME [--private] [...]"""

_DESCRIPTION = """\
Export the rows of a run, finished or not, in input order. Of an unfinished run, the rows that have a result so far.

  dpgen export runs/a answers.jsonl                   JSON lines; also .csv, both also with .gz, .bz2, .zst, or .parquet
  dpgen export runs/a answers                         a folder of Parquet files
  dpgen export runs/a saved --format save_to_disk     a folder for datasets.load_from_disk
  dpgen export runs/a sft.jsonl --format messages     conversations with the model's turn, for fine-tuning
  dpgen export runs/a --push-to-hub me/answers        a dataset of the Hub, with its card; a broken upload is continued

Nothing in the run directory is changed.
"""

_EPILOG = (
    "exit status: 0 done, 2 wrong usage or configuration, 75 the upload broke off, to be continued, 130 Ctrl-C, "
    "1 anything else"
)


def add_arguments(parser: CommandParser) -> None:
    """Declare the command line of `dpgen export`."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
    complete_directories(parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of one run"))
    complete_files(parser.add_argument("target", metavar="TARGET", nargs="?", help="the file or folder to write"))
    parser.add_argument(
        "--format",
        choices=("parquet", "jsonl", "csv", "save_to_disk", "messages"),
        metavar="FORMAT",
        help="parquet, jsonl, csv, save_to_disk or messages; by default that of TARGET's suffix, or else parquet",
    )
    parser.add_argument(
        "--columns",
        action="append",
        metavar="NAME,...",
        help="the columns to export, in this order; or a JSON list of names; all by default",
    )
    parser.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW", help="another name for a column; may be repeated"
    )
    parser.add_argument("--only-successful", action="store_true", help="leave out rows with an error")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote there")
    parser.add_argument("--push-to-hub", metavar="NAME", help="push to the dataset NAME or USER/NAME of the Hub")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make the dataset private")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines for people")


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    try:
        report, url = _export(options)
    except DpgenError as error:
        print(f"dpgen export: {redact_text(str(error))}", file=sys.stderr)
        return error.exit_status
    if report.num_done < report.num_input_rows:
        print(
            f"dpgen export: the run is unfinished: {report.num_done:,} of "
            f"{format_count(report.num_input_rows, 'row')} have a result, and only these are exported",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps({**dataclasses.asdict(report), "url": url}))
    else:
        print(_format_text(report, url))
    return EXIT_OK


def _export(options: argparse.Namespace) -> tuple[ExportReport, str | None]:
    path = Path(options.run_dir).expanduser()
    if not path.is_dir():
        raise ConfigError(f"RUN_DIR={path}: there is no such directory")
    if (options.target is None) == (options.push_to_hub is None):
        raise ConfigError("give either TARGET or --push-to-hub NAME; see dpgen export --help")
    if options.private and options.push_to_hub is None:
        raise ConfigError("--private needs --push-to-hub NAME")

    from dpgen.journal.run_dir import RunDir
    from dpgen.output.export.export import export_run, find_format
    from dpgen.output.export.hub import HubTarget, push_run
    from dpgen.output.export.selection import Selection

    run_dir = RunDir(str(path))
    selection = Selection(_parse_columns(options.columns), options.rename, options.only_successful)
    if options.push_to_hub is None:
        format = find_format(options.target, options.format)
        return export_run(run_dir, options.target, format, selection, overwrite=options.overwrite), None
    if options.format not in (None, "parquet"):
        raise ConfigError(f"--push-to-hub pushes Parquet files: leave --format {options.format} out")
    target = HubTarget(options.push_to_hub, private=options.private, overwrite=options.overwrite)
    return push_run(run_dir, target, selection)


def _parse_columns(texts: Sequence[str] | None) -> list[str] | None:
    if texts is None:
        return None
    names: list[str] = []
    for text in texts:
        if text.startswith("["):  # a name may hold a comma
            try:
                values = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"--columns {text}: this is no JSON list of names: {error}") from None
            if not all(isinstance(value, str) for value in values):
                raise ConfigError(f"--columns {text}: names are texts")
            names += values
        else:
            names += [name.strip() for name in text.split(",") if name.strip()]
    return names


def _format_text(report: ExportReport, url: str | None) -> str:
    rows = format_count(report.num_exported, "row")
    notes = [f"{report.num_errors:,} with an error"] if report.num_errors else []
    notes += [f"{report.num_left_out:,} left out"] if report.num_left_out else []
    detail = f" ({', '.join(notes)})" if notes else ""
    files = format_count(report.num_files, "file")
    return f"exported {rows}{detail} to {url or report.target}: {report.format}, {files}, {report.num_bytes:,} bytes"
