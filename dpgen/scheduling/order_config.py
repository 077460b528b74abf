"""Declare the settings of the order of work, and read the hints of how long rows get."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from dpgen.config.prompt import PromptConfig
from dpgen.config.schema import Config
from dpgen.config.sections import WorkConfig
from dpgen.data.input_rows import InputRows
from dpgen.data.openai_batch.requests import find_max_tokens
from dpgen.scheduling.groups.adapters import AdapterConfig

_MIN_GROUPED_FRACTION = 0.5  # of all rows, from which on rows with the same prompt are worth probes


@dataclass(frozen=True)
class OrderConfig:
    """Settings that decide the order of work.

    Attributes:
        max_tokens_column: column of each row's own `max_tokens`, or of its request; None where rows have none.
        prefix_caching: whether the engines cache prefixes.
        adapters: which row uses which LoRA adapter.
        reads_only: True if the model only reads prompts, so that their lengths tell all.
        is_mixed: spread the rows at the front over the whole order, so that a part of them stands for all.
        num_shards: of the first plan. Those of a later one, without ranks that were lost, are mixed nearly as evenly.
        is_sample: True if the rows to order are a sample of the run's, by `sample_rows`, to preview the choice.
    """

    work: WorkConfig
    prompt: PromptConfig
    max_tokens_column: str | None
    prefix_caching: bool
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    reads_only: bool = False
    is_mixed: bool = False
    num_shards: int = 1
    is_sample: bool = False

    @classmethod
    def from_config(cls, config: Config, num_shards: int) -> OrderConfig:
        """Return the settings of a run."""
        generates = config.pooling is None
        return cls(
            config.work,
            config.prompt.without_media,  # an order needs no contents of images
            (config.prompt.request_column or config.sampling_columns.get("max_tokens")) if generates else None,
            config.reads_prefix_cache,
            AdapterConfig.from_config(config),
            reads_only=config.pooling is not None,
            num_shards=num_shards,
        )

    @property
    def min_grouped_fraction(self) -> float:
        """Return the fraction of the rows from which on rows with the same prompt are worth probes."""
        # In a sample only the neighbours, half of it, show which rows have the same prompt.
        return _MIN_GROUPED_FRACTION / 2 if self.is_sample else _MIN_GROUPED_FRACTION

    @property
    def hint_column(self) -> str | None:
        """Return the column that best predicts the rows' lengths; None where there is none."""
        return self.work.hint_column or self.max_tokens_column

    def read_hints(self, rows: InputRows, column: str, row_ids: np.ndarray) -> np.ndarray:
        """Return one hint for each of some rows, float64[len(row_ids)]; NaN for a row without one.

        Args:
            column: `hint_column`.
        """
        if column != self.prompt.request_column:
            return rows.read_numbers(column, row_ids)
        limits = (find_max_tokens(row[column]) for row in rows.iter_rows(row_ids, [column]))
        return np.array([np.nan if limit is None else limit for limit in limits], dtype=np.float64)

    def drop_empty_hint(self, rows: InputRows, row_ids: np.ndarray) -> OrderConfig:
        """Return the settings without the requests' own `max_tokens`, if none of some rows has one."""
        column = self.prompt.request_column
        if column is None or column != self.hint_column or not np.isnan(self.read_hints(rows, column, row_ids)).all():
            return self
        return replace(self, max_tokens_column=None)
