"""Try settings on the job's own rows, and write the best as YAML: `dpgen tune CONFIG`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dpgen.commands.arguments.parser import CommandParser, complete_configuration, complete_files
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_OK, EXIT_RESUMABLE, ConfigError, DpgenError

if TYPE_CHECKING:
    from dpgen.commands.tune_job import TuneJob
    from dpgen.distributed.topology import Topology
    from dpgen.tuning.trial import Budget

_USAGE = "dpgen tune CONFIG.yaml [MORE.yaml ...] [key=value ...] [options]"

_DESCRIPTION = """\
Find the settings with which a job runs fastest on these GPUs, by trying them on the job's own rows: how many sequences
run at a time, engines of a rank, tensor against data parallelism, tokens of a batch, graphs, prefix caching. Nothing
is tried that changes the distribution of the results.

  dpgen tune conf.yaml                                  one rank
  torchrun --nproc-per-node N -m dpgen tune conf.yaml   N ranks of one machine
  dpgen run conf.yaml tuned.yaml                        the job, with what was found

A trial starts the engines with some settings, gives them rows that have the lengths of all rows, measures them once
they are settled, and ends. Settings that are surely slower are not measured to the end. Rows that a trial has finished
are done: a later 'dpgen run' of the same run directory has them. An interrupted search continues with the same command.
"""

_EPILOG = """\
speculative decoding is tried only with --speculative: it draws other samples, and belongs to what a run is. A run that
is to use it keeps the rows of the trials with run.resume=force, or begins in another directory.

exit status: 0 done, 2 wrong usage or configuration, 75 stopped but resumable, 1 anything else
"""
_METHODS = ("ngram", "suffix")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments, description and exit statuses to its parser."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
    add = parser.add_argument
    complete_configuration(add("configuration", nargs="*", metavar="CONFIG.yaml | key=value", help="as for dpgen run"))
    add(
        "--budget",
        default="5%",
        metavar="TIME",
        help="how long all trials together may take: a share of the job's estimated time, as 5%%, or 90s, 10m, 1h; the "
        "first trial is made in any case (default: 5%%)",
    )
    add(
        "--speculative",
        default="",
        metavar="METHODS",
        help=f"try speculative decoding without a draft model, too: {', '.join(_METHODS)}, or both with a comma",
    )
    complete_files(
        add("--output", default="tuned.yaml", metavar="FILE", help="where the best go (default: %(default)s)")
    )
    add("--json", action="store_true", help="print one JSON object instead of the table")


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from dpgen.distributed.topology import read_topology
    from dpgen.lifecycle.parent_death import set_parent_death_signal
    from dpgen.log import flush_logging, setup_logging

    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGUSR1, _interrupt)
    try:
        topology = read_topology(os.environ)
        _check_launcher(topology)
        if not topology.is_rank_0:
            return EXIT_OK  # under torchrun, rank 0 starts the ranks of each trial
        if topology.launcher == "torchrun":
            set_parent_death_signal(signal.SIGTERM)  # a killed torchrun leaves no trials on its GPUs
        setup_logging(0, "text")
        return _tune(options, topology)
    except KeyboardInterrupt:
        print("dpgen: stopped: interrupted. Rerun the same command to continue", file=sys.stderr)
        return EXIT_RESUMABLE
    except DpgenError as error:
        flush_logging()
        what = "stopped" if error.exit_status == EXIT_RESUMABLE else "error"
        print(f"dpgen: {what}: {redact_text(str(error))}", file=sys.stderr)
        return error.exit_status
    finally:
        flush_logging()


def parse_budget(text: str) -> Budget:
    """Return the budget in ``5%``, ``90s``, ``10m`` or ``1h``.

    Raises:
        ConfigError: the text holds anything else.
    """
    from dpgen.tuning.trial import Budget

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|s|m|h|)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--budget={text}: must be a share of the job's time, as 5%, or a time, as 90s, 10m or 1h")
    number = float(match[1])
    return Budget(fraction=number / 100) if match[2] == "%" else Budget(seconds=number * _SECONDS[match[2]])


def parse_methods(text: str) -> list[str]:
    """Return the methods of speculative decoding in ``ngram,suffix``.

    Raises:
        ConfigError: one of them is no method.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in names if name not in _METHODS]:
        raise ConfigError(f"--speculative={text}: {wrong[0]!r} must be one of {', '.join(_METHODS)}")
    return names


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does: the ranks end their trial in good order."""
    raise KeyboardInterrupt


def _check_launcher(topology: Topology) -> None:
    if topology.dp_size == 1:
        return
    if topology.launcher != "torchrun":
        raise ConfigError(
            f"dpgen tune starts its ranks itself, and {topology.launcher} has started {topology.dp_size} of it: start "
            "one, or torchrun --nproc-per-node N -m dpgen tune ... for N ranks"
        )
    if topology.local_size != topology.dp_size:
        raise ConfigError(
            f"dpgen tune measures one machine, and torchrun has started {topology.dp_size} ranks on several: start it "
            "on one of them, and give what it finds to the run on all"
        )


def _tune(options: argparse.Namespace, topology: Topology) -> int:
    if not options.configuration:
        raise ConfigError(f"no configuration; usage: {_USAGE}")
    from dpgen.commands.tune_job import TuneJob, TuneOptions

    output = Path(options.output).expanduser()
    _check_output(output, options.configuration)
    job = TuneJob(
        TuneOptions(
            options.configuration,
            topology.dp_size,
            topology.dp_size > 1 or topology.launcher == "torchrun",
            parse_budget(options.budget),
            parse_methods(options.speculative),
        )
    )
    job.run()
    _report(job, options, output)
    return EXIT_OK


def _check_output(path: Path, arguments: Sequence[str]) -> None:
    """Raise ConfigError if the best settings can't be written to a file, before anything is tried."""
    from dpgen.config.loader import split_arguments
    from dpgen.tuning.table import MARK, is_same_file

    files, _ = split_arguments(arguments)
    if any(is_same_file(name, str(path)) for name in files[:-1]):
        raise ConfigError(
            f"--output={path}: the file is part of the configuration, and others follow it. Give it last, to be tuned "
            "further, or choose another name"
        )
    try:
        is_foreign = path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    except OSError as error:
        raise ConfigError(f"--output={path}: {error.strerror}") from None
    if is_foreign:
        raise ConfigError(f"--output={path}: the file is there, and not of dpgen tune. Choose another name")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--output={path}: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--output={path}: can't be written: no permission for {folder}")


def _read_overlay(path: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what an overlay holds that the job is configured with, and that the new one replaces."""
    from dpgen.config.loader import split_arguments
    from dpgen.config.yaml.yaml_source import read_file
    from dpgen.tuning.table import is_same_file

    files, _ = split_arguments(arguments)
    return dict(read_file(files[-1]).value or {}) if files and is_same_file(files[-1], str(path)) else {}


def _report(job: TuneJob, options: argparse.Namespace, output: Path) -> None:
    """Print the table, and write the overlay."""
    from dpgen.journal.files import atomic_write_text
    from dpgen.log import flush_logging
    from dpgen.tuning import table
    from dpgen.tuning.space import find_changes

    search, rows = job.search, table.list_rows(job.search, job.base_limit, job.num_gpus)
    command = None
    if search.best is not None:
        best = next(row for row in rows if row.is_best)
        comments = [
            f"for {job.config.model}: {best.tokens_per_s:,.0f} tokens/s with {table.format_settings(best.overrides)}",
            f"changes: {best.changes}",
        ]
        atomic_write_text(output, table.to_overlay(search, comments, _read_overlay(output, options.configuration)))
        num_ranks = job.count_ranks_of(search.best.overrides)
        command = table.make_command(options.configuration, str(output), search.best.overrides, num_ranks)
    flush_logging()
    if options.json:
        print(json.dumps(_to_json(job, rows, output if command else None, command)))
        return
    for line in (*table.format_table(rows, has_gpus=job.num_gpus > 0), "", *table.format_end(search, rows)):
        print(line)
    if command is not None:
        print(f"the best are in {output}:\n  {command}")
    if search.best is not None and find_changes(search.best.overrides) == "draws":
        print(
            "speculative decoding belongs to what a run is: keep the rows that are done with run.resume=force, or "
            "begin in another run.dir"
        )


def _to_json(job: TuneJob, rows: list[Any], output: Path | None, command: str | None) -> dict[str, Any]:
    search = job.search
    return {
        "trials": [{**dataclasses.asdict(row), "changes": row.changes} for row in rows],
        "best": None if search.best is None else dict(search.best.overrides),
        "overlay": None if output is None else str(output),
        "command": command,
        "seconds": round(search.spent_s, 2),
        "num_rows_done": sum(result.num_rows for result in search.results),
        "is_complete": job.is_complete,
        "reason": search.reason,
    }
