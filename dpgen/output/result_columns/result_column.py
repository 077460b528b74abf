"""Describe one column that results add to the input's columns, and build its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpgen.output.column_values import LOGPROBS, Entry, to_shortest_decimals
from dpgen.records import Completion

if TYPE_CHECKING:
    import pyarrow as pa

    from dpgen.output.columns import DatasetFormat


@dataclass(frozen=True)
class ResultColumn:
    """Describe one column that results add to the input's columns.

    Attributes:
        name: the column's name.
        get_type: returns the Arrow type of a value; a function, since pyarrow is imported late.
        get: returns the value of an entry, or of one sample.
        is_of_sample: True if the value is of a sample, so that the column holds lists where an entry has several.
        is_present: whether a dataset of this format has the column.
        specialize: returns the same column as a dataset of this format has it.
        is_of_rejected: True if samples that failed their checks have the value, and others have none.
        build: returns the column's values at once; None to get each by `get`.
    """

    name: str
    get_type: Callable[[], pa.DataType]
    get: Callable[[Any], Any]
    is_of_sample: bool = True
    is_present: Callable[[DatasetFormat], bool] = lambda _: True
    specialize: Callable[[ResultColumn, DatasetFormat], ResultColumn] = lambda column, _: column
    is_of_rejected: bool = False
    build: Callable[[Sequence[Entry], DatasetFormat], pa.Array] | None = None

    def build_array(self, entries: Sequence[Entry], dataset_format: DatasetFormat) -> pa.Array:
        """Return the column's values, one for each entry."""
        import pyarrow as pa

        if self.build is not None:
            return self.build(entries, dataset_format)
        type: pa.DataType = self.get_type()
        get: Callable[[Any], Any] = self._get_of_sample if self.is_of_sample else self.get
        if dataset_format.file_format == "jsonl" and self.get_type is LOGPROBS:
            type, get_float32 = pa.list_(pa.float64()), get
            get = lambda item: to_shortest_decimals(get_float32(item))  # noqa: E731 - needs no name
        if not self.is_of_sample:
            return pa.array([get(entry) for entry in entries], type, from_pandas=True)  # NaN becomes null
        if dataset_format.has_lists:
            values = [[get(completion) for completion in entry.result.completions] or None for entry in entries]
            return pa.array(values, pa.list_(type), from_pandas=True)
        chosen = [None if entry.completion is None else get(entry.completion) for entry in entries]
        return pa.array(chosen, type, from_pandas=True)

    def _get_of_sample(self, completion: Completion) -> Any:
        return self.get(completion) if (completion.rejection is not None) == self.is_of_rejected else None
