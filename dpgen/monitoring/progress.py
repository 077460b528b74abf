"""Live numbers: one global bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from dpgen.formatting import format_count, format_duration
from dpgen.scheduling.generation_loop import Totals
from dpgen.scheduling.throughput import find_straggler


class ProgressDisplay:
    """Rank 0's view of the whole run.

    Args:
        num_rows: of the whole run.
        num_before: of those, how many an earlier attempt has finished.
        say: prints a line.
        interval_s: between lines where there is no terminal.
    """

    def __init__(
        self,
        num_rows: int,
        num_before: int,
        say: Callable[[str], None],
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_rows, self._num_before = num_rows, num_before
        self._say, self._interval_s, self._clock = say, interval_s, clock
        self._start_s = clock()
        self._next_line_s = self._start_s + interval_s
        self._last = (self._start_s, 0)
        self._bar: Any = None

    def open_bar(self) -> None:
        """Shows a bar from now on, if there is a terminal."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._num_rows, initial=self._num_before, unit="row", smoothing=0.1, leave=True)

    def update(self, totals: Totals) -> None:
        """Takes the totals of all ranks."""
        now = self._clock()
        if self._bar is not None:
            self._bar.set_postfix_str(self._format_rates(totals, now), refresh=False)
            self._bar.update(max(0, self._num_before + totals.num_rows - self._bar.n))  # less after a rank's loss
            self._bar.refresh()  # also where no row has come: the clock and the tokens go on
        elif now >= self._next_line_s:
            self._next_line_s = now + self._interval_s
            self._say(self.format_line(totals, now))

    def close(self) -> None:
        """Ends the bar; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def format_line(self, totals: Totals, now: float) -> str:
        """``120 of 200 rows (60 %), 5,312 tokens/s, 14 s left, 2 errors``."""
        done = self._num_before + totals.num_rows
        share = f"{100 * done / self._num_rows:.0f} %" if self._num_rows else "100 %"
        elapsed_s = now - self._start_s
        if totals.num_rows and elapsed_s > 0:
            left = format_duration((self._num_rows - done) * elapsed_s / totals.num_rows) + " left"
        else:
            left = "time left unknown"
        return f"{done:,} of {self._num_rows:,} rows ({share}), {self._format_rates(totals, now)}, {left}"

    def _format_rates(self, totals: Totals, now: float) -> str:
        since_s, tokens = self._last
        rate = (totals.num_generated_tokens - tokens) / (now - since_s) if now > since_s else 0.0
        if now - since_s >= min(5.0, self._interval_s):
            self._last = (now, totals.num_generated_tokens)
        shown = f"{rate:,.0f} tokens/s, {format_count(totals.num_errors, 'error')}"
        # Towards the end engines run out of rows, and their rates say nothing of them.
        slow = find_straggler(totals.rates) if totals.num_unclaimed else None
        return shown if slow is None else f"{shown}, rank {slow[0]} is slow ({100 * slow[1]:.0f} % of the others)"
