"""Describe the final dataset: columns that a result adds to the input's, their types, and where values come from.

The writer, the verification and the check of the input's names ask `ResultColumn`s: a new column is one entry here.

Log-probabilities are lists of float32, null where a token has none. In JSON lines they are the shortest decimals that
float32 reads back as the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpgen.config.pooling.pooling_config import PoolingConfig
from dpgen.config.prompt import PromptConfig
from dpgen.config.schema import Config
from dpgen.data.prompts.chat import Message
from dpgen.logprobs import TokenLogprobs
from dpgen.output.column_values import (
    BOOLEAN,
    ERROR,
    FLOAT64,
    INT64,
    LOGPROBS,
    SMALL_TOKEN_IDS,
    TEXT,
    TOKEN_IDS,
    TOOL_CALLS,
    Entry,
    escape_if_any,
    get_error,
    get_prompt_logprobs,
    get_sample_logprobs,
    get_scored_logprobs,
    get_text,
    get_token_ids,
    get_tool_calls,
    list_program_values,
)
from dpgen.output.json_lines import JSONL_ENCODING
from dpgen.output.json_schema.derivation import derive_returned_type, derive_type
from dpgen.output.json_schema.value_types import StructType, ValueType, read_value
from dpgen.output.result_columns.messages_column import MESSAGES, MESSAGES_COLUMN
from dpgen.output.result_columns.pooled_columns import POOLED_COLUMNS
from dpgen.output.result_columns.result_column import ResultColumn
from dpgen.records import Completion, PooledKind, RowResult

if TYPE_CHECKING:
    import pyarrow as pa


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
        parsed_type: the type of its values, by `output.schema`; None if they are JSON text.
        rejected_text: True if there is a column of the texts that failed their checks.
        messages: how rows became chats, if there is a column of these with the model's turn; None if there is none.
        kept_columns: the input columns in the dataset; None for all.
        jsonl_encoding: how JSON lines hold the input's values; see `dpgen.output.json_lines`.
        is_scored: True if rows have a given completion, and nothing is generated.
        logprobs, prompt_logprobs: True if there are columns of log-probabilities of the generated tokens, and of the
            prompts.
        is_program: True if rows were given to a program. program_type: of its columns; None for one of JSON text.
        top_logprobs, prompt_top_logprobs: True if there are also columns of the most likely tokens in their place;
            `prompt_top_logprobs` holds for given completions, too.
        pooling: the task, where the model's hidden states are pooled; None where text is generated.
        pooled: what the loaded model has said of its vectors; None where that is not known.
        reads_requests: True if rows are requests of a batch file.
        has_score_lists: True if each row has a list of documents, and hence of scores.
    """

    has_samples: bool = False
    explode: bool = False
    token_ids: bool = False
    reasoning: bool = False
    tool_calls: bool = False
    parsed: bool = False
    parsed_type: ValueType | None = None
    rejected_text: bool = False
    messages: PromptConfig | None = None
    file_format: str = "parquet"
    kept_columns: list[str] | None = None
    jsonl_encoding: int = JSONL_ENCODING
    is_scored: bool = False
    is_program: bool = False
    program_type: StructType | None = None
    logprobs: bool = False
    top_logprobs: bool = False
    prompt_logprobs: bool = False
    prompt_top_logprobs: bool = False
    pooling: PoolingConfig | None = None
    pooled: PooledKind | None = None
    reads_requests: bool = False
    has_score_lists: bool = False

    @classmethod
    def from_config(cls, config: Config, metadata: Mapping[str, Any] | None = None) -> DatasetFormat:
        """Return the format that a configuration asks for.

        Args:
            metadata: the content of run.json; None before a model is loaded.
        """
        output = dataclasses.asdict(config.output) | {"logprobs": config.keeps_logprobs}
        return cls.from_identity(
            {
                "sampling": config.sampling,
                "sampling_by_rank": config.sampling_by_rank,
                "output": output,
                "columns": config.data.columns,
                "prompt": dataclasses.asdict(config.prompt),
                "check": vars(config.check),
                "program": vars(config.program) if config.program.is_used else None,
                "pooling": None if config.pooling is None else vars(config.pooling),
            },
            metadata=metadata,
        )

    @classmethod
    def from_identity(
        cls,
        identity: Mapping[str, Any],
        jsonl_encoding: int = JSONL_ENCODING,
        metadata: Mapping[str, Any] | None = None,
    ) -> DatasetFormat:
        """Return the format that the identity in run.json implies.

        Runs of older versions kept no log-probabilities, whatever their sampling.

        Args:
            metadata: the content of run.json, which says what the loaded model's vectors are.
        """
        sampling, output = identity.get("sampling") or {}, identity.get("output") or {}
        if (program := identity.get("program")) is not None:
            returned, file_format = derive_returned_type(program["returns"]), str(output.get("format", "parquet"))
            plain = cls(is_program=True, program_type=returned, file_format=file_format, jsonl_encoding=jsonl_encoding)
            return dataclasses.replace(plain, kept_columns=identity.get("columns"))
        from_columns = sampling.get("from_columns") or {}
        sections = [sampling, *(identity.get("sampling_by_rank") or ())] if output.get("logprobs") else []

        reads_requests = (identity.get("prompt") or {}).get("request_column") is not None  # which may want anything

        def wants(*names: str, is_wanted: Callable[[Any], bool] = lambda value: value is not None) -> bool:
            by_column = bool(sections) and (reads_requests or any(name in from_columns for name in names))
            return by_column or any(is_wanted(section.get(name)) for section in sections for name in names)

        logprobs = wants("logprobs", "logprob_token_ids")
        schema, pooling, prompt = output.get("schema"), identity.get("pooling"), identity.get("prompt") or {}
        pooled = ((metadata or {}).get("engine") or {}).get("pooled")
        return cls(
            pooling=None if pooling is None else PoolingConfig(**pooling),
            pooled=None if pooled is None else PooledKind(**{**pooled, "labels": tuple(pooled["labels"])}),
            reads_requests=reads_requests,
            has_score_lists=prompt.get("documents_column") is not None,
            has_samples=pooling is None and (sampling.get("n", 1) != 1 or "n" in from_columns or reads_requests),
            explode=bool(output.get("explode")),
            token_ids=bool(output.get("token_ids")) or logprobs,
            reasoning=output.get("reasoning") == "split",
            tool_calls=output.get("tool_parser") is not None,
            parsed=output.get("parse") == "json" or schema is not None,
            parsed_type=None if schema is None else derive_type(schema).value_type,
            rejected_text=bool((identity.get("check") or {}).get("keep_rejected")),
            messages=PromptConfig(**identity["prompt"]) if output.get("messages") else None,
            is_scored=(identity.get("prompt") or {}).get("completion_column") is not None,
            logprobs=logprobs,
            top_logprobs=wants("logprobs", "logprob_token_ids", is_wanted=bool),
            prompt_logprobs=wants("prompt_logprobs"),
            prompt_top_logprobs=wants("prompt_logprobs", is_wanted=bool),
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
    def has_lists(self) -> bool:
        """Return True if the columns of a sample hold a list per row."""
        return self.has_samples and not self.explode

    @property
    def is_parsing(self) -> bool:
        """Return True if texts are parsed, so that a row may tell why its text could not be."""
        return self.reasoning or self.tool_calls or self.parsed

    @property
    def result_columns(self) -> tuple[ResultColumn, ...]:
        """Return the columns that results add, in their order in the dataset."""
        columns = [column.specialize(column, self) for column in _RESULT_COLUMNS if column.is_present(self)]
        if self.is_program:
            columns[1:1] = [ResultColumn(*values) for values in list_program_values(self.program_type)]
        return tuple(columns)


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
    return {column.name: column.build_array(entries, dataset_format) for column in dataset_format.result_columns}


def build_result_schema(dataset_format: DatasetFormat) -> pa.Schema:
    """Return names and types of the columns that results add."""
    import pyarrow as pa

    return pa.schema([(name, values.type) for name, values in build_result_arrays([], dataset_format).items()])


def list_float_columns(dataset_format: DatasetFormat) -> list[str]:
    """Return the names of the columns of log-probabilities, one a token or more: nearly all of their bits are noise."""
    return [
        column.name
        for column in dataset_format.result_columns
        if column.get_type is LOGPROBS or column.name == "embedding"
    ]


def _make_logprob_column(
    name: str,
    get_type: Callable[[], pa.DataType],
    get_logprobs: Callable[[Any], TokenLogprobs | None],
    field: str,
    flag: str,
) -> ResultColumn:
    """Return the column of one field of the log-probabilities of a sample, a prompt or a given completion.

    Args:
        flag: the field of `DatasetFormat` that says whether there is the column.
    """
    is_scored = get_logprobs is get_scored_logprobs
    return ResultColumn(
        name,
        get_type,
        lambda item: None if (logprobs := get_logprobs(item)) is None else getattr(logprobs, field),
        is_of_sample=get_logprobs is get_sample_logprobs,
        is_present=lambda dataset_format: bool(
            getattr(dataset_format, flag) and (dataset_format.is_scored or not is_scored)
        ),
    )


def _give_type(column: ResultColumn, parsed_type: ValueType | None) -> ResultColumn:
    """Return the column of parsed texts with values of a type; JSON text where there is none."""
    if parsed_type is None:
        return column
    get = lambda completion: read_value(completion.parsed, parsed_type)[0]  # noqa: E731 - a column of one line
    return dataclasses.replace(column, get_type=parsed_type.to_arrow, get=get)


def _add_misfits(column: ResultColumn, parsed_type: ValueType | None) -> ResultColumn:
    """Return the column of parse errors with those of values that don't fit their type."""
    if parsed_type is None:
        return column

    def get(completion: Completion) -> str | None:
        return escape_if_any(completion.parse_error or read_value(completion.parsed, parsed_type)[1])

    return dataclasses.replace(column, get=get)


def _is_generated(dataset_format: DatasetFormat) -> bool:
    return not dataset_format.is_scored and dataset_format.pooling is None


def _is_text(dataset_format: DatasetFormat) -> bool:
    return _is_generated(dataset_format) and not dataset_format.is_program


_RESULT_COLUMNS = (
    ResultColumn("row_id", INT64, lambda entry: entry.result.row, is_of_sample=False),
    ResultColumn(
        "sample_id",
        INT64,
        lambda entry: entry.sample,
        is_of_sample=False,
        is_present=lambda dataset_format: dataset_format.explode,
    ),
    ResultColumn("generated_text", TEXT, get_text, is_present=_is_text),
    ResultColumn("finish_reason", TEXT, lambda completion: completion.finish_reason, is_present=_is_text),
    ResultColumn("num_prompt_tokens", INT64, lambda entry: entry.result.num_prompt_tokens, is_of_sample=False),
    ResultColumn("num_generated_tokens", INT64, lambda completion: completion.num_tokens, is_present=_is_generated),
    ResultColumn("error", ERROR, get_error, is_of_sample=False),
    ResultColumn(
        "rejected_text",
        TEXT,
        get_text,
        is_present=lambda dataset_format: dataset_format.rejected_text,
        is_of_rejected=True,
    ),
    ResultColumn(
        "generated_token_ids", TOKEN_IDS, get_token_ids, is_present=lambda dataset_format: dataset_format.token_ids
    ),
    ResultColumn(
        "reasoning",
        TEXT,
        lambda completion: escape_if_any(completion.reasoning),
        is_present=lambda dataset_format: dataset_format.reasoning,
    ),
    ResultColumn("tool_calls", TOOL_CALLS, get_tool_calls, is_present=lambda dataset_format: dataset_format.tool_calls),
    ResultColumn(
        "parsed",
        TEXT,
        lambda completion: completion.parsed,
        is_present=lambda dataset_format: dataset_format.parsed,
        specialize=lambda column, dataset_format: _give_type(column, dataset_format.parsed_type),
    ),
    MESSAGES_COLUMN,
    ResultColumn(
        "parse_error",
        TEXT,
        lambda completion: escape_if_any(completion.parse_error),
        is_present=lambda dataset_format: dataset_format.is_parsing,
        specialize=lambda column, dataset_format: _add_misfits(column, dataset_format.parsed_type),
    ),
    _make_logprob_column("token_logprobs", LOGPROBS, get_sample_logprobs, "logprobs", "logprobs"),
    _make_logprob_column("cumulative_logprob", FLOAT64, get_sample_logprobs, "total", "logprobs"),
    _make_logprob_column("top_token_ids", SMALL_TOKEN_IDS, get_sample_logprobs, "top_token_ids", "top_logprobs"),
    _make_logprob_column("top_logprobs", LOGPROBS, get_sample_logprobs, "top_logprobs", "top_logprobs"),
    _make_logprob_column("completion_logprob", FLOAT64, get_scored_logprobs, "total", "is_scored"),
    ResultColumn(
        "completion_is_greedy",
        BOOLEAN,
        lambda entry: None if entry.result.scored is None else entry.result.scored.is_greedy,
        is_of_sample=False,
        is_present=lambda dataset_format: dataset_format.is_scored,
    ),
    _make_logprob_column("completion_token_ids", SMALL_TOKEN_IDS, get_scored_logprobs, "token_ids", "is_scored"),
    _make_logprob_column("completion_token_logprobs", LOGPROBS, get_scored_logprobs, "logprobs", "is_scored"),
    _make_logprob_column(
        "completion_top_token_ids", SMALL_TOKEN_IDS, get_scored_logprobs, "top_token_ids", "prompt_top_logprobs"
    ),
    _make_logprob_column(
        "completion_top_logprobs", LOGPROBS, get_scored_logprobs, "top_logprobs", "prompt_top_logprobs"
    ),
    _make_logprob_column("prompt_token_ids", SMALL_TOKEN_IDS, get_prompt_logprobs, "token_ids", "prompt_logprobs"),
    _make_logprob_column("prompt_logprobs", LOGPROBS, get_prompt_logprobs, "logprobs", "prompt_logprobs"),
    _make_logprob_column(
        "prompt_top_token_ids", SMALL_TOKEN_IDS, get_prompt_logprobs, "top_token_ids", "prompt_top_logprobs"
    ),
    _make_logprob_column("prompt_top_logprobs", LOGPROBS, get_prompt_logprobs, "top_logprobs", "prompt_top_logprobs"),
    *POOLED_COLUMNS,
)
