"""Count what is exported, for the report and the dataset card, in memory that does not grow with the rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_LENGTHS = ("num_prompt_tokens", "num_generated_tokens")


@dataclass
class ExportStats:
    """Count rows and what they hold.

    Attributes:
        num_rows: exported rows; samples where each is a row of its own.
        num_left_out: rows with a result that were not exported.
        errors: error type → exported rows.
        finish_reasons: vLLM's reason → samples.
        lengths: column of token counts → number of tokens → how often.
    """

    num_rows: int = 0
    num_left_out: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in _LENGTHS})

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table of the dataset, under the names that the dataset gives its columns."""
        self.num_rows += table.num_rows
        names = set(table.column_names)
        if "error" in names:
            import pyarrow.compute as pc

            _count(self.errors, pc.struct_field(table["error"], "type"))
        if "finish_reason" in names:
            _count(self.finish_reasons, table["finish_reason"])
        for name in names & self.lengths.keys():
            _count(self.lengths[name], table[name])

    def summarize_lengths(self, name: str) -> dict[str, float] | None:
        """Return min, mean, median, p99, max and total of a column of token counts; None if it has no values."""
        counts = sorted(self.lengths[name].items())
        total = sum(number for _, number in counts)
        if not total:
            return None
        num_tokens = sum(length * number for length, number in counts)
        quantiles = {fraction: _find_quantile(counts, fraction * total) for fraction in (0.5, 0.99)}
        return {
            "min": counts[0][0],
            "mean": num_tokens / total,
            "median": quantiles[0.5],
            "p99": quantiles[0.99],
            "max": counts[-1][0],
            "total": num_tokens,
        }


def _find_quantile(counts: list[tuple[int, int]], rank: float) -> int:
    seen = 0
    for length, number in counts:
        seen += number
        if seen >= rank:
            return length
    return counts[-1][0]


def _count(counter: Counter[str] | Counter[int], column: pa.ChunkedArray) -> None:
    """Count the values of a column, or of its lists; nulls count as nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    for entry in pc.value_counts(values.drop_null()).to_pylist():
        counter[entry["values"]] += entry["counts"]
