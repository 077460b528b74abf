"""Read the input of a few rows from a finished run's dataset, to show it beside their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpgen.config.schema import Config
from dpgen.journal.run_dir import RunDir

_MAX_CHARS = 2_000


def read_prompts(run_dir: RunDir, config: Config, rows: Sequence[int]) -> Mapping[int, str]:
    """Return what the prompts of rows are made of, by row; nothing where the dataset is not here or has other rows."""
    column = config.data.messages_column or config.data.prompt_column
    if column is None or not run_dir.is_finished or config.output.format != "parquet" or config.output.explode:
        return {}
    try:
        return _read_column(run_dir, column, sorted(rows))
    except Exception:  # noqa: BLE001 - foreign files; the page does without
        return {}


def _read_column(run_dir: RunDir, column: str, rows: Sequence[int]) -> dict[int, str]:
    import pyarrow.parquet as pq

    prompts: dict[int, str] = {}
    first = 0
    for path in sorted(run_dir.dataset.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                wanted = [row for row in rows if first <= row < first + num_rows]
                if wanted:
                    values = file.read_row_group(group, columns=[column]).column(column)
                    prompts |= {row: _to_text(values[row - first].as_py()) for row in wanted}
                first += num_rows
    return prompts


def _to_text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} ..."
