"""Draw the run's progress bar on a terminal, by rich.

- A thread draws, and `TerminalBar.show` only stores the newest state. A terminal that is stopped (Ctrl-S), slow or gone
  therefore neither blocks nor ends the run.
- Log lines appear above the bar: rich replaces `sys.stderr` while it draws, and the handler of `dpgen.log` looks
  `sys.stderr` up whenever it writes a line.
- This module imports rich, and `ProgressDisplay` imports this module only where there is a terminal.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpgen.formatting import format_duration

logger = logging.getLogger(__name__)

_REFRESH_S = 0.5
_CLOSE_TIMEOUT_S = 2.0


class TerminalBar:
    """Draw one bar on stderr until it is closed; its last state stays on the screen.

    Args:
        num_rows: rows of the whole run.
        num_done: rows that are done already.
    """

    def __init__(self, num_rows: int, num_done: int) -> None:
        self._num_rows = num_rows
        # One object, so that the thread never sees one part new and another one old.
        self._state: tuple[int, str, Sequence[str]] = (
            num_done,
            "",
            (),
        )
        self._start_s = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)
        self._thread.start()

    def show(self, num_done: int, text: str, lines: Sequence[str] = ()) -> None:
        """Show the number of rows done, a text below the bar and lines below that, from the next redraw on.

        Never blocks.

        Args:
            num_done: ignored if less than before: the sum over the ranks shrinks when one is lost.
            lines: the terminal shows as many as it has room for.
        """
        self._state = (max(self._state[0], num_done), text, lines)

    def close(self) -> None:
        """Draw the last state and end the thread, or leave it behind if the terminal takes nothing for two seconds."""
        self._closed.set()
        self._thread.join(_CLOSE_TIMEOUT_S)
        # A thread that is left behind holds rich's lock, so nothing may be written through rich from now on.
        sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def _draw(self) -> None:
        try:
            with Live(
                get_renderable=self._render,
                console=Console(stderr=True),
                auto_refresh=False,
                redirect_stdout=False,  # stdout may be a file
            ) as live:
                live.refresh()
                while not self._closed.wait(_REFRESH_S):
                    live.refresh()
        except Exception:  # the thread boundary: a terminal that is gone ends the bar, and not the run
            logger.debug("the progress bar ended early", exc_info=True)

    def _render(self) -> Group:
        num_done, text, lines = self._state
        fraction = num_done / self._num_rows if self._num_rows else 1.0
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(
            f"{100 * fraction:3.0f} %",
            ProgressBar(total=1.0, completed=fraction),
            f"{num_done:,}/{self._num_rows:,} rows",
        )
        elapsed = f"{format_duration(time.monotonic() - self._start_s)} elapsed"
        below = Text(f"{text}, {elapsed}" if text else elapsed)
        return Group(line, below, *(Text(rank, no_wrap=True, overflow="ellipsis") for rank in lines))


def can_draw() -> bool:
    """Return True if stderr is a terminal that can redraw its lines; one with TERM=dumb can't."""
    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal
