"""Show how a run is, from any shell that sees its directory: `dpgen status RUN_DIR`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dpgen.commands.arguments.parser import complete_directories
from dpgen.config.secrets import redact_text
from dpgen.errors import EXIT_FAILED, EXIT_USAGE, DpgenError

if TYPE_CHECKING:
    from dpgen.monitoring.status.run_status import RunStatus, RunWatcher

_WATCH_INTERVAL_S = 2.0

_DESCRIPTION = """\
Show how a run is: the whole and each rank, stragglers, errors by type, the time left, and whom the ranks wait for.

Only files in RUN_DIR are read, from any host that sees them. Ranks of other hosts are watched for a few seconds to tell
a live run from a dead one. Where nodes do not share RUN_DIR, a node shows its own ranks and the sums over all.
"""

_EPILOG = """\
states: starting, live, finished, stopped (resumable), failed, dead (its ranks ended without a word; resumable), unknown
(no status files here, as of an older version). With --watch also checking, until it is known whether the ranks live.

--json prints one object with the fields of RunStatus (dpgen/monitoring/status/run_status.py); with --watch one a line
every two seconds. Fields may be added, and version grows when one is removed or changes its meaning.

exit status: 0 starting, live or finished; 75 stopped but resumable; 1 failed, dead or unknown; 2 wrong usage, or no run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments, description and exit statuses to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    complete_directories(parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of one run"))
    parser.add_argument(
        "--watch", action="store_true", help="show it again every two seconds, until it is finished or Ctrl-C"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines for people")


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from dpgen.monitoring.status.run_status import RunWatcher, watch_until_known

    path = Path(options.run_dir).expanduser()
    watcher = RunWatcher(path)
    try:
        if options.watch:
            return _watch(watcher, path, as_json=options.json)
        if not watcher.has_run:
            what = "holds no run" if path.is_dir() else "there is no such directory"
            print(f"dpgen status: RUN_DIR={path}: {what}", file=sys.stderr)
            return EXIT_USAGE
        status = watch_until_known(watcher, time.sleep)
    except DpgenError as error:
        print(f"dpgen: error: {redact_text(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    _print(status, as_json=options.json)
    return status.exit_status


def _watch(watcher: RunWatcher, path: Path, *, as_json: bool) -> int:
    """Show the status again and again; a directory without a run may get one."""

    def read() -> RunStatus | None:
        return watcher.read() if watcher.has_run else None

    status: RunStatus | None = None
    if not as_json and sys.stdout.isatty():
        from dpgen.monitoring.status.live_page import show_live

        status = show_live(read, lambda: time.sleep(_WATCH_INTERVAL_S), f"{path}: no run yet")
        if status is not None:
            _print(status, as_json=False)
    else:
        try:
            while (status := read()) is None or status.state != "finished":
                if status is not None:
                    _print(status, as_json=as_json)
                time.sleep(_WATCH_INTERVAL_S)
            _print(status, as_json=as_json)
        except (KeyboardInterrupt, BrokenPipeError):
            pass
    return EXIT_USAGE if status is None else status.exit_status


def _print(status: RunStatus, *, as_json: bool) -> None:
    from dpgen.monitoring.status.page import format_ranks, format_run

    if as_json:
        print(json.dumps(dataclasses.asdict(status)), flush=True)
        return
    lines = [*format_run(status), *(["", *format_ranks(status.ranks)] if status.ranks else [])]
    print("\n".join(lines), flush=True)
