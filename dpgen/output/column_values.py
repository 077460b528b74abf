"""Make the values of the columns that results add: their Arrow types, and what Arrow takes of a result or a sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpgen.data.prompts.chat import Message
from dpgen.logprobs import TokenLogprobs
from dpgen.output.conversations import append_turn
from dpgen.output.json_schema.value_types import StructType, ValueType
from dpgen.records import Completion, RowError, RowResult

if TYPE_CHECKING:
    import pyarrow as pa


class Entry(NamedTuple):
    """Hold what one row of the dataset tells: a result, or with `output.explode` one of its samples.

    Attributes:
        sample: index of the sample; None for the whole result, and for one without samples.
        conversation: the messages that the row was generated from; None where no column asks for them.
    """

    result: RowResult
    sample: int | None = None
    conversation: Sequence[Message] | None = None

    @property
    def completion(self) -> Completion | None:
        """Return the sample, or the only one of a result."""
        return next(iter(self.result.completions[self.sample or 0 :]), None)


def escape_surrogates(text: str) -> str:
    """Return the text with lone surrogates as escapes; UTF-8, and so every file format, rejects them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def get_text(completion: Completion) -> str:
    """Return the sample's text."""
    return escape_surrogates(completion.text)


def get_error(entry: Entry) -> dict[str, str] | None:
    """Return the error of a row, or of a sample that is a row of its own; None if there is none."""
    error = entry.result.error
    if entry.sample is not None and entry.completion is not None:
        rejection = entry.completion.rejection
        error = None if rejection is None else RowError("check_failed", rejection)
    return None if error is None else {"type": error.type, "message": escape_surrogates(error.message)}


def get_messages(entry: Entry, *, has_parts: bool = False) -> list[dict[str, Any]] | None:
    """Return the conversation with the model's turn; None where the row has none. See `append_turn`."""
    if entry.completion is None or entry.completion.rejection is not None or entry.conversation is None:
        return None
    messages: list[dict[str, Any]] = escape_all_surrogates(
        append_turn(entry.conversation, entry.completion, has_parts=has_parts)
    )
    return messages


def escape_all_surrogates(value: Any) -> Any:
    """Return a JSON value whose texts have lone surrogates as escapes."""
    if isinstance(value, str):
        return escape_surrogates(value)
    if isinstance(value, dict):
        return {key: escape_all_surrogates(item) for key, item in value.items()}
    return [escape_all_surrogates(item) for item in value] if isinstance(value, list) else value


def escape_if_any(text: str | None) -> str | None:
    """Return the text as `escape_surrogates` does; None for none."""
    return None if text is None else escape_surrogates(text)


def list_program_values(returned: StructType | None) -> list[tuple[str, Callable[[], Any], Callable[[Any], Any], bool]]:
    """Return the columns of what rows' programs return, and of how many calls they have made.

    Args:
        returned: the type of the dict; None for one column of JSON text.

    Returns:
        (name, get_type, get, is_of_sample) of each, as in `ResultColumn`.
    """
    num_calls = ("num_calls", INT64, lambda entry: entry.result.num_calls, False)
    if returned is None:
        return [("program", TEXT, lambda completion: escape_if_any(completion.parsed), True), num_calls]
    parts = [(name, type.to_arrow, _make_part_reader(name, type), True) for name, type in returned.properties]
    return [*parts, num_calls]


def _make_part_reader(name: str, type: ValueType) -> Callable[[Completion], Any]:
    def read(completion: Completion) -> Any:
        return type.convert(escape_all_surrogates(json.loads(completion.parsed or "{}")).get(name))

    return read


def get_tool_calls(completion: Completion) -> list[dict[str, str]]:
    """Return the sample's calls."""
    return [
        {"id": call.id, "name": escape_surrogates(call.name), "arguments": escape_surrogates(call.arguments)}
        for call in completion.tool_calls
    ]


def to_shortest_decimals(values: np.ndarray | None) -> np.ndarray | None:
    """Return float32 values as float64 whose JSON is no longer than float32 needs: -0.1, not -0.10000000149011612."""
    return None if values is None else values.astype("U").astype(np.float64)


def shorten_decimals(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return a table whose columns of lists of float32 are float64, as `to_shortest_decimals` returns them."""
    import pyarrow as pa

    for name in names:
        index = table.column_names.index(name)
        type = table.schema.types[index]
        text = _replace_item_type(type, pa.float32(), pa.string())
        number = _replace_item_type(type, pa.float32(), pa.float64())
        table = table.set_column(index, pa.field(name, number), table.column(index).cast(text).cast(number))
    return table


def _replace_item_type(type: pa.DataType, old: pa.DataType, new: pa.DataType) -> pa.DataType:
    from dpgen.data.reading.python_values import replace_leaf_types

    return replace_leaf_types(type, lambda leaf: new if leaf == old else leaf)


def get_token_ids(completion: Completion) -> Sequence[int] | np.ndarray | None:
    """Return the generated tokens; None if they were not kept."""
    return completion.token_ids if completion.logprobs is None else completion.logprobs.token_ids


def get_sample_logprobs(completion: Completion) -> TokenLogprobs | None:
    """Return the log-probabilities of a sample; None if they were not kept."""
    return completion.logprobs


def get_prompt_logprobs(entry: Entry) -> TokenLogprobs | None:
    """Return the log-probabilities of the prompt; None if they were not kept."""
    return entry.result.prompt_logprobs


def get_scored_logprobs(entry: Entry) -> TokenLogprobs | None:
    """Return the log-probabilities of a given completion; None if there is none."""
    return None if entry.result.scored is None else entry.result.scored.logprobs


def _make_type(build: Callable[[Any], pa.DataType]) -> Callable[[], pa.DataType]:
    """Return a function that returns an Arrow type, since pyarrow is imported late."""

    def get_type() -> pa.DataType:
        import pyarrow as pa

        return build(pa)

    return get_type


INT64 = _make_type(lambda pa: pa.int64())
FLOAT64 = _make_type(lambda pa: pa.float64())
BOOLEAN = _make_type(lambda pa: pa.bool_())
TEXT = _make_type(lambda pa: pa.string())
ERROR = _make_type(lambda pa: pa.struct([("type", pa.string()), ("message", pa.string())]))
TOOL_CALLS = _make_type(lambda pa: pa.list_(pa.struct([(name, pa.string()) for name in ("id", "name", "arguments")])))
TOKEN_IDS = _make_type(lambda pa: pa.list_(pa.int64()))
SMALL_TOKEN_IDS = _make_type(lambda pa: pa.list_(pa.int32()))
LOGPROBS = _make_type(lambda pa: pa.list_(pa.float32()))
