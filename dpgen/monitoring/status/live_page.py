"""Show the status of a run on a terminal, again and again, by rich. Imported only by `dpgen status --watch`."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dpgen.monitoring.status.page import format_ranks, format_run
from dpgen.monitoring.status.run_status import RunStatus


def show_live(read: Callable[[], RunStatus | None], wait: Callable[[], None], missing: str) -> RunStatus | None:
    """Draw the status until the run is finished, or the user presses Ctrl-C; return the last one.

    Args:
        read: returns the status now; None while there is no run yet.
        wait: returns when the next look is due.
        missing: what to show while there is no run yet.
    """
    console, status = Console(), None
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                status = read()
                live.update(Text(missing) if status is None else render(status, console.height), refresh=True)
                if status is not None and status.state == "finished":
                    break
                wait()
    except KeyboardInterrupt:
        pass
    return status


def render(status: RunStatus, height: int) -> Text:
    """Return the page; where the terminal has too few lines for all ranks, the last line counts those left out."""
    lines = [*format_run(status), ""]
    ranks = list(format_ranks(status.ranks))
    room = max(2, height - len(lines) - 1)
    shown = ranks if len(ranks) <= room else [*ranks[: room - 1], f"... {len(ranks) - room + 1} ranks more"]
    return Text("\n".join([*lines, *shown]), no_wrap=True, overflow="ellipsis")
