"""Show what a run will do, before it begins: `dpgen preview CONFIG`.

Lines for people or, with `--json`, one JSON object, whose keys are stable.
"""

from __future__ import annotations

import argparse
import os
import sys

from dpgen.commands.arguments.parser import CommandParser, complete_configuration, complete_directories
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ConfigError, DpgenError
from dpgen.simulation.lengths import LENGTHS_HELP

_DESCRIPTION = """\
Show what a run will do, within seconds, without an engine or a GPU, and write nothing to its directory: the first
prompts exactly as the model will see them, token counts against max_model_len, the rows that will fail and why, the
order of work, what each rank gets, sampling, unused columns, and an estimate of tokens, time and GPU-hours.

  dpgen preview conf.yaml data.limit=1000 --ranks 8

A large input is sampled, and the preview says so. `dpgen run CONFIG.yaml --dry-run` shows the same.
"""

_EPILOG = """\
exit status: 0 for a configuration that could run, also where rows fail; 2 wrong usage or configuration, 130 Ctrl-C,
1 anything else
"""


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments, description and exit statuses to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    complete_configuration(add("configuration", nargs="*", metavar="CONFIG.yaml | key=value", help="as for dpgen run"))
    add("--rows", type=int, default=3, metavar="N", help="show the first N prompts (default: %(default)s)")
    add("--row", type=int, action="append", metavar="ROW", help="show this row instead, whole; may be repeated")
    add("--sample", type=int, default=10_000, metavar="N", help="examine at most N rows (default: %(default)s)")
    add("--ranks", type=int, metavar="N", help="number of ranks (default: the launcher's, or 1)")
    complete_directories(
        add("--calibrate", metavar="RUN_DIR", help="estimate by what this run has measured (default: run.dir)")
    )
    add("--gpu", metavar="NAME", help="estimate for this GPU, e.g. H100 (default: this machine's)")
    add("--lengths", metavar="KIND", help=f"estimate for these generated tokens per row: {LENGTHS_HELP}")
    add("--json", action="store_true", help="print one JSON object instead of lines for people")


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from dpgen.distributed.topology import read_topology

    try:
        topology = read_topology(os.environ)
        if not topology.is_rank_0:
            return EXIT_OK  # under a launcher, rank 0 shows the preview
        _print_preview(options, topology.dp_size)
    except DpgenError as error:
        print(f"dpgen: error: {redact_text(str(error))}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    return EXIT_OK


def _print_preview(options: argparse.Namespace, num_ranks: int) -> None:
    _check_options(options)
    from dpgen.config.loader import load_from_args
    from dpgen.log import flush_logging, setup_logging

    config = load_from_args(options.configuration)
    setup_logging(0, config.run.log_format)
    from dpgen.commands.preview_job import print_preview
    from dpgen.monitoring.preview import PreviewOptions

    chosen = PreviewOptions(options.rows, tuple(options.row or ()), options.sample, options.ranks or num_ranks)
    try:
        print_preview(
            config,
            chosen,
            as_json=options.json,
            calibrate=options.calibrate,
            gpu=options.gpu,
            lengths=options.lengths,
        )
    finally:
        flush_logging()


def _check_options(options: argparse.Namespace) -> None:
    if not options.configuration:
        raise ConfigError("no configuration; usage: dpgen preview CONFIG.yaml [MORE.yaml ...] [key=value ...]")
    for name, minimum in (("rows", 0), ("sample", 1), ("ranks", 1)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name}={value}: must be at least {minimum}")
