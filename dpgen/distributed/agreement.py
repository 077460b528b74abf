"""Agree on the input: every rank loads it, and all of them see the same rows.

- A difference is a `ConfigError` on every rank, before a model loads.
- The contents are hashed once a node, by its first rank; the others load what that one has cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dpgen.config.schema import DataConfig
from dpgen.data.input_rows import InputRows, load_input
from dpgen.distributed.group import RankGroup
from dpgen.errors import ConfigError


def open_input(
    data: DataConfig, group: RankGroup, check_columns: Callable[[Sequence[str]], None]
) -> tuple[InputRows, dict[str, Any]]:
    """Load the input and return it with its fingerprint. Collective.

    Args:
        check_columns: raises ConfigError where the configuration names a column that the input lacks. Not called for
            an empty input, whose columns may be unknown.

    Raises:
        ConfigError: the input can't be read, differs between ranks or nodes, or lacks a column.
    """

    def load() -> tuple[InputRows, dict[str, Any] | None]:
        with group.node_leader_first():
            rows = load_input(data)
            return rows, rows.fingerprint() if group.is_node_leader else None

    rows, fingerprint = group.run_on_all_ranks(load)
    fingerprints = [node for node in group.all_gather_object(fingerprint) if node is not None]
    sizes = group.all_gather_object(len(rows))

    def check() -> None:
        if any(num_rows != len(rows) for num_rows in sizes):
            counts = ", ".join(f"{num_rows:,}" for num_rows in sorted(set(sizes)))
            raise ConfigError(f"data.path={data.path}: ranks read different numbers of rows ({counts}). Is it growing?")
        if any(node != fingerprints[0] for node in fingerprints):
            raise ConfigError(f"data.path={data.path}: nodes hold different rows. Copy the same files to all of them")
        if not rows.is_empty:
            check_columns(rows.columns)

    group.run_on_all_ranks(check)
    return rows, fingerprints[0]
