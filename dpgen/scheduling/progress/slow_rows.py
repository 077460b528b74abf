"""Compute something from the prompts of many rows, without the rows that take too long to render or have killed ranks.

All ranks leave out the same rows: another rank may render a slow row just in time, and what it computes would differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from dpgen.config.prompt import PromptConfig
from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.render import make_prompt_text_fn
from dpgen.data.time_limit import RenderTimer
from dpgen.distributed.group import RankGroup
from dpgen.formatting import format_count
from dpgen.journal.row_notes import ORDERING, RowNote
from dpgen.records import RowError
from dpgen.scheduling.groups.prefix_groups import SlowRow
from dpgen.scheduling.order import PromptTextFn, RowOrder, order_rows
from dpgen.scheduling.order_config import OrderConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_SLOW_ROWS = 4  # each costs all ranks the time limit


class SlowRowFilter:
    """Find the rows that take longer than `data.render_timeout_s` to render on any rank.

    Args:
        note: says which row is being rendered, should this process die.

    Attributes:
        errors: rows to reject, with their errors; the same on every rank.
        suspects: rows that are left out, and not rejected; the same on every rank.
    """

    def __init__(self, prompt: PromptConfig, limit_s: float, group: RankGroup, note: RowNote | None = None) -> None:
        self._prompt, self._limit_s, self._group, self._note = prompt, limit_s, group, note or RowNote()
        self.errors: dict[int, RowError] = {}
        self.suspects: set[int] = set()

    @property
    def limit(self) -> str:
        """The limit, as its key and value."""
        return f"data.render_timeout_s={self._limit_s:g}"

    def compute(self, row_ids: np.ndarray, action: Callable[[np.ndarray, PromptTextFn], T]) -> T | None:
        """Return `action(rows, text_of)` without the rows to leave out, or None if too many are slow. Collective.

        Args:
            row_ids: indices of the rows, int64[num_rows].
            action: reads prompts by `text_of`; called again without a row that turns out to be slow.
        """
        num_slow = 0
        while num_slow < _MAX_SLOW_ROWS:
            kept = row_ids[~self.is_left_out(row_ids)]
            outcome = self._group.run_on_all_ranks(lambda: self._try(kept, action))  # noqa: B023 - called at once
            found = self._group.all_gather_object(outcome.row if isinstance(outcome, SlowRow) else None)
            slow = sorted({row for row in found if row is not None})
            if not slow and not isinstance(outcome, SlowRow):
                return outcome
            num_slow += len(slow)
            error = RowError("render_timeout", f"rendering took longer than {self.limit} when the rows were ordered")
            self.errors |= dict.fromkeys(slow, error)
            if self._group.rank == 0:
                logger.warning(
                    f"rendering takes longer than {self.limit}, rejecting {format_count(len(slow), 'row')}: "
                    f"{', '.join(map(str, slow))}"
                )
        return None

    def order(self, config: OrderConfig, rows: InputRows, row_ids: np.ndarray) -> RowOrder:
        """Read the prompts of rows, and return the order that they suggest, the rows to leave out last. Collective.

        Args:
            row_ids: indices of the rows, int64[num_rows], ascending.
        """
        order = self.compute(row_ids, lambda kept, text_of: order_rows(config, rows, kept, text_of))
        if order is None:
            return RowOrder(row_ids, reason=f"because rendering takes longer than {self.limit} for several rows")
        return order.append(row_ids[self.is_left_out(row_ids)])

    def is_left_out(self, row_ids: np.ndarray) -> np.ndarray:
        """Return which of the rows are rejected or suspects, bool[num_rows]."""
        return np.isin(row_ids, [*self.errors, *self.suspects])

    def _try(self, row_ids: np.ndarray, action: Callable[[np.ndarray, PromptTextFn], T]) -> T | SlowRow:
        try:
            with RenderTimer(self._limit_s) as timer:
                make_text = timer.limit(make_prompt_text_fn(self._prompt))

                def text_of(row: int, columns: Mapping[str, Any]) -> str:
                    return self._note.run(ORDERING, row, make_text, columns)

                return action(row_ids, text_of)
        except SlowRow as error:
            return error
