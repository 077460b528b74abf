"""Show a run's progress: one global bar on a terminal, or a log line from time to time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpgen.config.completion_checks import CHECK_NAMES
from dpgen.formatting import format_count, format_duration
from dpgen.monitoring.run_report import format_fraction, format_retries
from dpgen.monitoring.time_left import estimate_time_left
from dpgen.scheduling.progress.throughput import find_straggler
from dpgen.scheduling.progress.totals import Totals

if TYPE_CHECKING:
    from dpgen.monitoring.progress_bar import TerminalBar

logger = logging.getLogger(__name__)

_RATE_WINDOW_S = 5.0


class ProgressDisplay:
    """Show the whole run's progress on rank 0.

    Args:
        num_rows: rows of the whole run.
        num_before: rows that earlier attempts have finished.
        interval_s: seconds between log lines where there is no terminal.
        format_ranks: returns a line for each rank, given the rates in the totals; None to show the whole run only.
    """

    def __init__(
        self,
        num_rows: int,
        num_before: int,
        interval_s: float,
        format_ranks: Callable[[Sequence[int]], list[str]] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_rows, self._num_before = num_rows, num_before
        self._interval_s, self._clock = interval_s, clock
        self._format_ranks = format_ranks or (lambda rates: [])
        self._start_s = clock()
        self._next_line_s = self._start_s + interval_s
        self._window_start = (self._start_s, 0)  # (time in seconds, tokens by then)
        self._bar: TerminalBar | None = None

    def open_bar(self) -> None:
        """Show a bar from now on, if stderr is a terminal."""
        if not sys.stderr.isatty():
            return
        from dpgen.monitoring.progress_bar import TerminalBar, can_draw

        if can_draw():
            self._bar = TerminalBar(self._num_rows, self._num_before)

    def update(self, totals: Totals) -> None:
        """Show the totals of all ranks; never blocks."""
        now_s = self._clock()
        if self._bar is not None:
            text = self._format_bar_text(totals, now_s)
            self._bar.show(self._num_before + totals.num_rows, text, self._format_ranks(totals.rates))
        elif now_s >= self._next_line_s:
            self._next_line_s = now_s + self._interval_s
            logger.info(self.format_line(totals, now_s))
            for line in self._format_ranks(totals.rates):
                logger.info(line)

    def close(self) -> None:
        """Close the bar; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def format_line(self, totals: Totals, now_s: float) -> str:
        """Return ``120 of 200 rows (60 %), 5,312 tokens/s, 2 errors, 14 s left``."""
        num_done = self._num_before + totals.num_rows
        percent = 100 * num_done / self._num_rows if self._num_rows else 100
        return (
            f"{num_done:,} of {self._num_rows:,} rows ({percent:.0f} %), {self._format_rates(totals, now_s)}, "
            f"{self._format_time_left(totals, now_s)}"
        )

    def _format_bar_text(self, totals: Totals, now_s: float) -> str:
        elapsed_s = now_s - self._start_s
        rows_per_s = totals.num_rows / elapsed_s if elapsed_s > 0 else 0.0
        rates, time_left = self._format_rates(totals, now_s), self._format_time_left(totals, now_s)
        return f"{rows_per_s:,.1f} rows/s, {rates}, {time_left}"

    def _format_time_left(self, totals: Totals, now_s: float) -> str:
        num_remaining = self._num_rows - self._num_before - totals.num_rows
        left = estimate_time_left([(self._start_s, 0), (now_s, totals.num_rows)], num_remaining)
        return "time left unknown" if left is None else f"{format_duration(left.expected_s)} left"

    def _format_rates(self, totals: Totals, now_s: float) -> str:
        start_s, num_tokens = self._window_start
        window_s = now_s - start_s
        tokens_per_s = (totals.num_tokens - num_tokens) / window_s if window_s > 0 else 0.0
        if window_s >= min(_RATE_WINDOW_S, self._interval_s):
            self._window_start = (now_s, totals.num_tokens)
        rates = f"{tokens_per_s:,.0f} {totals.token_unit}s/s, {format_count(totals.num_errors, 'error')}"
        if totals.num_calls:
            rates += f", {format_count(totals.num_calls, 'call')}"
        retries = format_retries(dict(zip(CHECK_NAMES, totals.num_retries, strict=True)))
        if retries:
            rates += f", {retries}"
        if totals.num_rejected_tokens:
            rates += f", {format_fraction(totals.num_rejected_tokens, totals.num_generated_tokens)} of tokens rejected"
        # Once all rows are claimed, engines run out of rows, and their rates no longer show how fast they are.
        straggler = find_straggler(totals.rates) if totals.num_unclaimed else None
        if straggler is None:
            return rates
        rank, fraction = straggler
        return f"{rates}, rank {rank} is slow ({100 * fraction:.0f} % of the other ranks' median)"
