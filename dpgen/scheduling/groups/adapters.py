"""Choose each row's LoRA adapter, and keep the rows of one adapter together where engines can't hold all of them.

- An engine runs rows of at most `num_slots` adapters in one step. With more adapters in any order, rows would wait for
  a slot, and adapters would be loaded again and again.
- Rows without an adapter take no slot. They are ordered as those of one more adapter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpgen.config.prompt import REQUEST_COLUMN
from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows
from dpgen.data.openai_batch.lines import BAD_REQUEST, UNKNOWN_MODEL
from dpgen.data.openai_batch.requests import read_server_request
from dpgen.engine.adapters import choose_num_slots
from dpgen.errors import RowRefused, suggest_name
from dpgen.formatting import describe_type, format_count
from dpgen.records import ServerRequest


@dataclass(frozen=True)
class AdapterConfig:
    """Settings that decide which row uses which adapter.

    Attributes:
        names: the run's adapters.
        column: the column that names a row's adapter. None: all rows use the only adapter; or none, without adapters.
        num_slots: adapters that an engine has in use at a time.
        model_names: names of the model itself, where rows are requests that name it or an adapter; None where they are
            not.
    """

    names: tuple[str, ...] = ()
    column: str | None = None
    num_slots: int = 1
    model_names: tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, config: Config) -> AdapterConfig:
        """Return the settings of a run."""
        names = tuple(sorted(config.lora))
        num_slots = choose_num_slots(len(names), config.engine)
        if config.reads_requests:
            return cls(names, REQUEST_COLUMN if names else None, num_slots, list_model_names(config))
        return cls(names, config.data.lora_column, num_slots)

    @property
    def columns(self) -> list[str]:
        """Return the columns that name a row's adapter, besides those of its prompt."""
        return [] if self.column is None else [self.column]

    @property
    def exceeds_slots(self) -> bool:
        """Return True if there are more adapters than an engine has in use at a time."""
        return self.column is not None and len(self.names) > self.num_slots

    def choose(self, columns: Mapping[str, Any], request: ServerRequest | None = None) -> str | None:
        """Return a row's adapter; None for the model without one.

        Args:
            request: the row's request; None where rows are none.

        Raises:
            RowRefused: `unknown_adapter`, `wrong_type`; for a request `unknown_model`, `bad_request`.
        """
        if request is not None:
            return self._choose_by_model(request.body.get("model"))
        if self.column is None:
            return self.names[0] if self.names else None
        name = columns[self.column]
        if name is None:
            return None
        if not isinstance(name, str):
            raise RowRefused("wrong_type", f"{self.column} is {describe_type(name)}, not a string")
        if name not in self.names:
            hint = suggest_name(name, self.names, "adapters")
            raise RowRefused("unknown_adapter", f"{self.column}: there is no adapter {name!r}{hint}")
        return name

    def find(self, columns: Mapping[str, Any]) -> str | None:
        """Return a row's adapter; None for the model without one, and for a row that is rejected."""
        if not self.names:
            return None
        try:
            request = None if self.model_names is None else read_server_request(columns[REQUEST_COLUMN])
            return self.choose(columns, request)
        except RowRefused:
            return None

    def _choose_by_model(self, name: Any) -> str | None:
        if not name:  # the server takes the model itself, too
            return None
        if not isinstance(name, str):
            raise RowRefused(BAD_REQUEST, f"'model' is {describe_type(name)}, not a string")
        if name in self.names:
            return name
        model_names = self.model_names or ()
        if name not in model_names:
            hint = suggest_name(name, [*model_names, *self.names], "models")
            raise RowRefused(UNKNOWN_MODEL, f"the model {name!r} does not exist{hint}")
        return None


def list_model_names(config: Config) -> tuple[str, ...]:
    """Return the names by which a request may call the model: as vLLM's server, or the last part of its path."""
    served = config.engine.get("served_model_name") or []
    names = [served] if isinstance(served, str) else [str(name) for name in served]
    return tuple(dict.fromkeys([*names, config.model, os.path.basename(config.model.rstrip("/"))]))


class AdapterGroups:
    """Group rows that use the same adapter.

    Args:
        group: each row's adapter by a number, int32[num_dataset_rows]; -1 for a row without one, or not grouped.
    """

    def __init__(self, group: np.ndarray, config: AdapterConfig) -> None:
        self._group = group
        self.description = (
            f"one adapter after the other ({format_count(len(config.names), 'adapter')}, "
            f"{format_count(config.num_slots, 'slot')})"
        )

    def sort(self, rows: np.ndarray, num_first: int) -> np.ndarray:
        """Return the rows' positions, int64[num_rows], with the rows of each adapter together, in their order.

        Adapters come in the order of their first rows.

        Args:
            rows: row indices, int64[num_rows].
            num_first: rows at the front that stay before all others.
        """
        _, first, group = np.unique(self._group[rows], return_index=True, return_inverse=True)
        positions: np.ndarray = np.lexsort((first[group], np.arange(len(rows)) >= num_first))
        return positions


def group_by_adapter(config: AdapterConfig, rows: InputRows, row_ids: np.ndarray) -> AdapterGroups:
    """Read the adapters' names of some rows and group them.

    Args:
        row_ids: indices of the rows, int64[n].
    """
    assert config.column is not None
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(config.names)}
    group = np.full(len(rows), -1, dtype=np.int32)
    for row_id, columns in zip(row_ids, rows.iter_rows(row_ids, [config.column]), strict=True):
        group[row_id] = numbers.get(config.find(columns), -1)
    return AdapterGroups(group, config)
