"""Build a row's request: its prompt, its adapter, and the sampling parameters that are its own.

A request depends on the row and the run's settings alone: not on the rank that builds the request, the world size, the
order, or a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.input_rows import InputRows
from dpgen.data.nested import drop_nulls
from dpgen.data.prompts.render import RenderedPrompt, RenderFn
from dpgen.data.time_limit import limit_render_time
from dpgen.errors import RowRefused
from dpgen.journal.row_notes import RENDERING, RowNote
from dpgen.records import Request, RequestId, RowError, derive_seed
from dpgen.scheduling.groups.adapters import AdapterConfig
from dpgen.scheduling.preparation import NoPreparer, Preparer

_READ_AHEAD_BYTES = 256 << 20  # of rows that hold images, say


@dataclass(frozen=True)
class RequestBuilder:
    """Build a row's request: its prompt, its adapter, and the sampling parameters that are its own.

    Attributes:
        render: returns a row's prompt.
        run_seed: every row's seed is derived from this one; None leaves sampling unseeded.
        sampling_columns: field of SamplingParams → column.
        sampling_by_rank: entries with fields of SamplingParams. Row i takes entry i modulo the number of entries. In
            dataset order shards are strided, so with as many ranks as entries each rank's shard has one entry. A row
            that another rank steals keeps its entry.
        base_sampling: fields of SamplingParams that every row has, unless an entry or a column gives others.
        note: says which row is being rendered, should this process die.
        rejected_rows: rows known to take too long to render, or to kill their rank; they are rejected without another
            try.
        has_added_nulls: True if Arrow may have given objects of a column the keys of other rows' objects, as null.
        adapters: which row uses which LoRA adapter.
        preparer: prepares what the engine can't take as it is built.
        max_rows_ahead: rows that may be read ahead, as their size allows.
    """

    render: RenderFn
    run_seed: int | None
    sampling_columns: Mapping[str, str]
    sampling_by_rank: Sequence[Mapping[str, Any]] = ()
    base_sampling: Mapping[str, Any] = field(default_factory=dict)
    note: RowNote = field(default_factory=RowNote)
    rejected_rows: Mapping[int, RowError] = field(default_factory=dict)
    has_added_nulls: bool = True
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    preparer: Preparer = field(default_factory=NoPreparer)
    max_rows_ahead: int = 1 << 30

    @classmethod
    def from_config(cls, config: Config, rows: InputRows, render: RenderFn, **others: Any) -> RequestBuilder:
        """Return the builder of a run: prompts by `render`, in the time that `data.render_timeout_s` gives.

        Args:
            others: further attributes.
        """
        return cls(
            limit_render_time(render, config.data.render_timeout_s),
            config.run.seed,
            config.sampling_columns,
            config.sampling_by_rank,
            has_added_nulls=rows.has_added_nulls,
            adapters=AdapterConfig.from_config(config),
            max_rows_ahead=max(1, int(_READ_AHEAD_BYTES / max(1.0, rows.mean_row_bytes))),
            **others,
        )

    def build(self, row: int, columns: Mapping[str, Any]) -> Request:
        """Return the request of a row.

        Raises:
            RowRefused: the prompt could not be made, or there is no such adapter or model.
        """
        if (error := self.rejected_rows.get(row)) is not None:
            raise RowRefused(error.type, error.message)
        rendered = RenderedPrompt(*self.note.run(RENDERING, row, self.render, columns))
        entries = self.sampling_by_rank
        # A request is adjusted to the run's parsers as a whole, where it calls for them.
        sampling: dict[str, Any] = dict(self.base_sampling) if rendered.server_request is None else {}
        if entries:
            sampling |= entries[row % len(entries)]
        if self.run_seed is not None and rendered.pooling is None:
            sampling["seed"] = derive_seed(self.run_seed, RequestId(row))
        for name, column in self.sampling_columns.items():
            value = _drop_nulls(columns[column]) if self.has_added_nulls else columns[column]
            if value is not None:  # a null keeps the value of the run or of the entry
                sampling[name] = value
        return Request(
            RequestId(row),
            rendered.token_ids,
            rendered.prompt,
            sampling,
            self.adapters.choose(columns, rendered.server_request),
            rendered.num_completion_tokens,
            rendered.server_request,
            rendered.pooling,
        )


def derive_request_seed(run_seed: int | None, sampling: Mapping[str, Any], id: RequestId) -> Any:
    """Return the seed of a request for more than a row's first attempt at its one prompt; None for none.

    It follows from the run's seed, or from the row's own, where a column gives one.

    Args:
        sampling: of the row's own request.
    """
    seed = sampling.get("seed")
    is_derived = run_seed is not None and seed == derive_seed(run_seed, RequestId(id.row))
    base = run_seed if is_derived else seed
    return derive_seed(base, id) if isinstance(base, int) and id != RequestId(id.row) else seed


def _drop_nulls(value: Any) -> Any:
    """Return a column's value without null keys; None if no key is left, since some writers know no null structs."""
    try:
        kept = drop_nulls(value)
        return None if value and kept == {} else kept
    except RecursionError:
        raise RowRefused("bad_sampling", "a value of sampling.from_columns is nested too deep") from None
