"""Describe the final dataset: columns that a result adds to the input's, their types, and where values come from.

The writer, the verification and the check of the input's names all ask `ResultColumn`s, so a new column is one entry
here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dpgen.config.prompt import PromptConfig
from dpgen.config.schema import Config
from dpgen.data.prompts.chat import Message
from dpgen.output.conversations import append_turn, get_messages_type
from dpgen.output.json_lines import JSONL_ENCODING
from dpgen.records import Completion, RowResult

if TYPE_CHECKING:
    import pyarrow as pa


MESSAGES = "messages"  # the only column that needs the input as well as the result


@dataclass(frozen=True)
class DatasetFormat:
    """Describe how a run writes its dataset.

    Attributes:
        has_samples: True if rows may have several samples, so that the columns of a sample hold a list per row.
        explode: True if each sample is a row of its own.
        token_ids: True if there is a column of token ids.
        file_format: "parquet" or "jsonl".
        reasoning: True if there is a column of reasoning.
        tool_calls: True if there is a column of tool calls.
        parsed: True if there is a column of parsed texts.
        messages: how rows became chats, if there is a column of these with the model's turn; None if there is none.
        kept_columns: the input columns in the dataset; None for all.
        jsonl_encoding: how JSON lines hold the input's values; see `dpgen.output.json_lines`.
    """

    has_samples: bool = False
    explode: bool = False
    token_ids: bool = False
    reasoning: bool = False
    tool_calls: bool = False
    parsed: bool = False
    messages: PromptConfig | None = None
    file_format: str = "parquet"
    kept_columns: list[str] | None = None
    jsonl_encoding: int = JSONL_ENCODING

    @classmethod
    def from_config(cls, config: Config) -> DatasetFormat:
        """Return the format that a configuration asks for."""
        return cls.from_identity(
            {
                "sampling": config.sampling,
                "output": dataclasses.asdict(config.output),
                "columns": config.data.columns,
                "prompt": dataclasses.asdict(config.prompt),
            }
        )

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any], jsonl_encoding: int = JSONL_ENCODING) -> DatasetFormat:
        """Return the format that the identity in run.json implies."""
        sampling, output = identity.get("sampling") or {}, identity.get("output") or {}
        return cls(
            has_samples=sampling.get("n", 1) != 1 or "n" in (sampling.get("from_columns") or {}),
            explode=bool(output.get("explode")),
            token_ids=bool(output.get("token_ids")),
            reasoning=output.get("reasoning") == "split",
            tool_calls=output.get("tool_parser") is not None,
            parsed=output.get("parse") == "json",
            messages=PromptConfig(**identity["prompt"]) if output.get("messages") else None,
            file_format=str(output.get("format", "parquet")),
            kept_columns=identity.get("columns"),
            jsonl_encoding=jsonl_encoding,
        )

    def select_kept_columns(self, input_columns: Sequence[str]) -> list[str]:
        """Return the input's columns in the dataset.

        A column `messages` that chats were made of is not among them: the result's, which has the model's turn as well,
        takes its place.
        """
        kept = list(input_columns) if self.kept_columns is None else self.kept_columns
        if self.messages is None or self.messages.messages_column != MESSAGES:
            return kept
        return [name for name in kept if name != MESSAGES]

    @property
    def is_parsing(self) -> bool:
        """Return True if texts are parsed, so that a row may tell why its text could not be."""
        return self.reasoning or self.tool_calls or self.parsed

    @property
    def result_columns(self) -> tuple[ResultColumn, ...]:
        """Return the columns that results add, in their order in the dataset."""
        return tuple(column for column in _RESULT_COLUMNS if column.is_present(self))


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


@dataclass(frozen=True)
class ResultColumn:
    """Describe one column that results add to the input's columns.

    Attributes:
        name: the column's name.
        get_type: returns the Arrow type of a value; a function, since pyarrow is imported late.
        get: returns the value of an entry, or of one sample.
        is_of_sample: True if the value is of a sample, so that the column holds lists where an entry has several.
        is_present: whether a dataset of this format has the column.
    """

    name: str
    get_type: Callable[[], pa.DataType]
    get: Callable[[Any], Any]
    is_of_sample: bool = True
    is_present: Callable[[DatasetFormat], bool] = lambda _: True

    def build_array(self, entries: Sequence[Entry], *, has_lists: bool) -> pa.Array:
        """Return the column's values, one for each entry."""
        import pyarrow as pa

        if not self.is_of_sample:
            return pa.array([self.get(entry) for entry in entries], self.get_type())
        if has_lists:
            values = [[self.get(completion) for completion in entry.result.completions] or None for entry in entries]
            return pa.array(values, pa.list_(self.get_type()))
        chosen = [None if entry.completion is None else self.get(entry.completion) for entry in entries]
        return pa.array(chosen, self.get_type())


def list_entries(
    results: Sequence[RowResult],
    dataset_format: DatasetFormat,
    conversations: Sequence[Sequence[Message] | None] | None = None,
) -> list[Entry]:
    """Return the dataset's rows for some results: one for each, or with `output.explode` one for each sample.

    A result without samples is one row, too.

    Args:
        conversations: one for each result; None where no column asks for them.
    """
    sources = list(zip(results, conversations or [None] * len(results), strict=True))
    if not dataset_format.explode:
        return [Entry(result, None, conversation) for result, conversation in sources]
    return [
        Entry(result, sample, conversation)
        for result, conversation in sources
        for sample in (range(len(result.completions)) or (None,))
    ]


def build_result_arrays(entries: Sequence[Entry], dataset_format: DatasetFormat) -> dict[str, pa.Array]:
    """Return the columns that results add, by name, as Arrow arrays with one value for each entry."""
    has_lists = dataset_format.has_samples and not dataset_format.explode
    return {column.name: column.build_array(entries, has_lists=has_lists) for column in dataset_format.result_columns}


def build_result_schema(dataset_format: DatasetFormat) -> pa.Schema:
    """Return names and types of the columns that results add."""
    import pyarrow as pa

    return pa.schema([(name, values.type) for name, values in build_result_arrays([], dataset_format).items()])


def escape_surrogates(text: str) -> str:
    """Return the text with lone surrogates as escapes; UTF-8, and so every file format, rejects them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _get_text(completion: Completion) -> str:
    return escape_surrogates(completion.text)


def _get_error(entry: Entry) -> dict[str, str] | None:
    error = entry.result.error
    return None if error is None else {"type": error.type, "message": escape_surrogates(error.message)}


def _int64() -> pa.DataType:
    import pyarrow as pa

    return pa.int64()


def _string() -> pa.DataType:
    import pyarrow as pa

    return pa.string()


def _error() -> pa.DataType:
    import pyarrow as pa

    return pa.struct([("type", pa.string()), ("message", pa.string())])


def _tool_calls() -> pa.DataType:
    import pyarrow as pa

    return pa.list_(pa.struct([(name, pa.string()) for name in ("id", "name", "arguments")]))


def _get_messages(entry: Entry) -> list[dict[str, Any]] | None:
    if entry.completion is None or entry.conversation is None:
        return None
    messages: list[dict[str, Any]] = escape_all_surrogates(append_turn(entry.conversation, entry.completion))
    return messages


def escape_all_surrogates(value: Any) -> Any:
    """Return a JSON value whose texts have lone surrogates as escapes."""
    if isinstance(value, str):
        return escape_surrogates(value)
    if isinstance(value, dict):
        return {key: escape_all_surrogates(item) for key, item in value.items()}
    return [escape_all_surrogates(item) for item in value] if isinstance(value, list) else value


def _escape_if_any(text: str | None) -> str | None:
    return None if text is None else escape_surrogates(text)


def _get_tool_calls(completion: Completion) -> list[dict[str, str]]:
    return [
        {"id": call.id, "name": escape_surrogates(call.name), "arguments": escape_surrogates(call.arguments)}
        for call in completion.tool_calls
    ]


def _token_ids() -> pa.DataType:
    import pyarrow as pa

    return pa.list_(pa.int64())


_RESULT_COLUMNS = (
    ResultColumn("row_id", _int64, lambda entry: entry.result.row, is_of_sample=False),
    ResultColumn(
        "sample_id",
        _int64,
        lambda entry: entry.sample,
        is_of_sample=False,
        is_present=lambda dataset_format: dataset_format.explode,
    ),
    ResultColumn("generated_text", _string, _get_text),
    ResultColumn("finish_reason", _string, lambda completion: completion.finish_reason),
    ResultColumn("num_prompt_tokens", _int64, lambda entry: entry.result.num_prompt_tokens, is_of_sample=False),
    ResultColumn("num_generated_tokens", _int64, lambda completion: completion.num_tokens),
    ResultColumn("error", _error, _get_error, is_of_sample=False),
    ResultColumn(
        "generated_token_ids",
        _token_ids,
        lambda completion: completion.token_ids,
        is_present=lambda dataset_format: dataset_format.token_ids,
    ),
    ResultColumn(
        "reasoning",
        _string,
        lambda completion: _escape_if_any(completion.reasoning),
        is_present=lambda dataset_format: dataset_format.reasoning,
    ),
    ResultColumn(
        "tool_calls", _tool_calls, _get_tool_calls, is_present=lambda dataset_format: dataset_format.tool_calls
    ),
    ResultColumn(
        "parsed",
        _string,
        lambda completion: completion.parsed,
        is_present=lambda dataset_format: dataset_format.parsed,
    ),
    ResultColumn(
        MESSAGES,
        get_messages_type,
        _get_messages,
        is_of_sample=False,
        is_present=lambda dataset_format: dataset_format.messages is not None,
    ),
    ResultColumn(
        "parse_error",
        _string,
        lambda completion: _escape_if_any(completion.parse_error),
        is_present=lambda dataset_format: dataset_format.is_parsing,
    ),
)
