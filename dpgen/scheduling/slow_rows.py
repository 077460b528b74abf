"""Compute something from the prompts of many rows, without the rows that take too long to render.

All ranks leave out the same rows: another rank may render a slow row just in time, and what it computes would differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dpgen.config.prompt import PromptConfig
from dpgen.data.render import make_prompt_text_fn
from dpgen.data.time_limit import RenderTimer
from dpgen.distributed.group import RankGroup
from dpgen.formatting import format_count
from dpgen.scheduling.order import PromptTextFn
from dpgen.scheduling.prefix_groups import SlowRow

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_SLOW_ROWS = 4  # each costs all ranks the time limit


class SlowRowFilter:
    """Find the rows that take longer than `data.render_timeout_s` to render on any rank.

    Attributes:
        rows: the slow rows so far; the same on every rank.
    """

    def __init__(self, prompt: PromptConfig, limit_s: float, group: RankGroup) -> None:
        self._prompt, self._limit_s, self._group = prompt, limit_s, group
        self.rows: set[int] = set()

    @property
    def limit(self) -> str:
        """The limit, as its key and value."""
        return f"data.render_timeout_s={self._limit_s:g}"

    def compute(self, row_ids: np.ndarray, action: Callable[[np.ndarray, PromptTextFn], T]) -> T | None:
        """Return `action(rows, text_of)` for the rows that are not slow, or None if too many rows are. Collective.

        Args:
            row_ids: indices of the rows, int64[num_rows].
            action: reads prompts by `text_of`; called again without a row that turns out to be slow.
        """
        while len(self.rows) < _MAX_SLOW_ROWS:
            kept = row_ids[~self.is_slow(row_ids)]
            outcome = self._group.run_on_all_ranks(lambda: self._try(kept, action))  # noqa: B023 - called at once
            found = self._group.all_gather_object(outcome.row if isinstance(outcome, SlowRow) else None)
            slow = sorted({row for row in found if row is not None})
            if not slow and not isinstance(outcome, SlowRow):
                return outcome
            self.rows |= set(slow)
            if self._group.rank == 0:
                logger.warning(
                    f"rendering takes longer than {self.limit}, rejecting {format_count(len(slow), 'row')}: "
                    f"{', '.join(map(str, slow))}"
                )
        return None

    def is_slow(self, row_ids: np.ndarray) -> np.ndarray:
        """Return which of the rows are slow, bool[num_rows]."""
        return np.isin(row_ids, list(self.rows))

    def _try(self, row_ids: np.ndarray, action: Callable[[np.ndarray, PromptTextFn], T]) -> T | SlowRow:
        try:
            with RenderTimer(self._limit_s) as timer:
                return action(row_ids, timer.limit(make_prompt_text_fn(self._prompt)))
        except SlowRow as error:
            return error
