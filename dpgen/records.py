"""Define the records that pass between the wings: requests to the engine, and results from it.

- A row's index in the input identifies the row everywhere, and a `RequestId` each request for it.
- Classes and fields of results keep their names: hashes in the `_SUCCESS` files of older runs depend on them.
- `dpgen.result_codec` has their form in the journal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dpgen.errors import RowRefused
from dpgen.logprobs import TokenLogprobs

POOLED_TYPE = "<f4"  # of the values of `PooledOutput`, on the disk
_SHOWN_VALUES = 4


class Record:
    """Let a frozen dataclass with slots cross a pipe in half the time: its values go as one tuple."""

    __slots__ = ()
    _get_values: ClassVar[Callable[[Any], tuple[Any, ...]]]

    def __init_subclass__(cls) -> None:
        if cls.__slots__:  # the class that `dataclass` makes of the one that is written here
            cls._get_values = attrgetter(*cls.__slots__)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), type(self)._get_values(self)


@dataclass(frozen=True, slots=True)
class ServerRequest:
    """Hold a request as vLLM's server takes it.

    Attributes:
        url: of the endpoint, as "/v1/chat/completions".
        body: its fields, which nobody has checked; on the way to the engine, those that are not the prompt.
    """

    url: str
    body: dict[str, Any]


class RequestId(NamedTuple):
    """Identify a request: what it generates of which row. Its seed follows from it.

    Attributes:
        row: the row's index in the input.
        call: number of the call, where generating a row takes several.
        sample: the sample that is generated; 0 where all samples of the row are generated at once.
        attempt: number of the try, of those that end with a completion.
    """

    row: int
    call: int = 0
    sample: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class PoolingRequest(Record):
    """Ask a pooling model for vectors of one or several sequences, instead of generating text.

    Attributes:
        task: "embed", "classify", "score" or "reward".
        lengths: tokens of each sequence; the request's `prompt_token_ids` hold them one after the other. Empty for a
            single sequence.
        texts: for each sequence, which of the row's texts it is a part of: chunks of a long text share one. Empty where
            each sequence is a text of its own.
        second_starts: for each sequence, from which token on it is the second text of a pair, for models that are told
            so (token_type_ids); -1 for none. Empty where no model is told.
        has_query: True if the first text is a query, and the result says how similar the others are to it.
        num_cut_tokens: tokens of the row's texts that were cut off.
        dimensions: of each embedding; None for all that the model gives.
        normalize: True if embeddings get length 1; None as the model's files say.
        is_per_token: True if the result has a vector for each token.
    """

    task: str
    lengths: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()
    second_starts: tuple[int, ...] = ()
    has_query: bool = False
    num_cut_tokens: int = 0
    dimensions: int | None = None
    normalize: bool | None = None
    is_per_token: bool = False

    @property
    def num_sequences(self) -> int:
        return len(self.lengths) or 1

    def split(self, token_ids: list[int]) -> Iterator[list[int]]:
        """Yield the tokens of each sequence.

        Args:
            token_ids: the request's `prompt_token_ids`.
        """
        if not self.lengths:
            yield token_ids
        start = 0
        for length in self.lengths:
            yield token_ids[start : start + length]
            start += length


@dataclass(frozen=True, slots=True)
class Request(Record):
    """Hold one row that is ready to generate, or a part of it.

    Attributes:
        id: identifies the request while it is in flight.
        prompt_token_ids: the prompt; None if only the engine's own tokenizer can make the tokens from `prompt`.
        prompt: the text, or the chat (`ChatPrompt`), if `prompt_token_ids` is None.
        sampling: SamplingParams fields of this row only: from its entry of sampling_by_rank, its seed, and values
            taken from columns.
        adapter: the name of the row's LoRA adapter; None for the model without one.
        num_completion_tokens: how many tokens at the end of the prompt are a given completion, which is scored instead
            of generating one; 0 to generate.
        server_request: what says how to sample, over `sampling`, as it would say it to vLLM's server; None where only
            `sampling` does.
        pooling: what is asked of a pooling model; None to generate text.
        media: the memory with what the model takes of the prompt's media; the tokens that stand for them are in
            `prompt_token_ids`. None for a prompt without media, and until workers have prepared it.
    """

    id: RequestId
    prompt_token_ids: list[int] | None
    prompt: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    num_completion_tokens: int = 0
    server_request: ServerRequest | None = None
    pooling: PoolingRequest | None = None
    media: Any = None

    @property
    def row(self) -> int:
        return self.id.row


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Hold one call of a tool that a completion asks for.

    Attributes:
        id: vLLM's, made up for the call; "" where the parser gives none.
        name: of the function.
        arguments: as JSON text; the model wrote it, so it may be no JSON.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Completion(Record):
    """Hold one sample of a row.

    Attributes:
        text: the generated text; without the parts that the next four fields hold.
        finish_reason: vLLM's value: "stop", "length", ...
        num_tokens: number of generated tokens.
        token_ids: the generated tokens; None unless output.token_ids asks for them, or if `logprobs` has them.
        reasoning: what the model thought before it answered; None unless output.reasoning=split found any.
        tool_calls: the calls that output.tool_parser found.
        parsed: the text's JSON value, as canonical JSON text; None unless output.parse=json found one.
        parse_error: why the text could not be parsed; None if it could.
        logprobs: the generated tokens with their log-probabilities; None unless sampling.logprobs asks for them.
        rejection: why the sample failed its checks for the last time; None if it passed. Its text then is the rejected
            one, or "" where that is not kept.
        stop_reason: the stop string, or the id of the stop token, that ended it; None if nothing of the kind did, and
            unless the row is a request of a batch file.
        has_null_content: True if parsers have left nothing of the answer to a request of a batch file, which its
            response shows as null rather than as an empty text; None otherwise.
    """

    text: str
    finish_reason: str | None
    num_tokens: int
    token_ids: list[int] | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    parsed: str | None = None
    parse_error: str | None = None
    logprobs: TokenLogprobs | None = None
    rejection: str | None = None
    stop_reason: int | str | None = None
    has_null_content: bool | None = None


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """Hold what the model makes of a given completion.

    Attributes:
        logprobs: its tokens with their log-probabilities.
        is_greedy: True if each of its tokens is more likely than any other token there.
    """

    logprobs: TokenLogprobs
    is_greedy: bool


@dataclass(frozen=True, slots=True, eq=False)
class PooledOutput(Record):
    """Hold a row's vectors.

    Attributes:
        values: float32[num_vectors, width].
        num_chunks: sequences that the row's text was read in; more than 1 with data.too_long=chunk_mean.
        num_cut_tokens: tokens of the row's texts that were not read, with data.too_long=truncate.
    """

    values: np.ndarray
    num_chunks: int = 1
    num_cut_tokens: int = 0

    def __eq__(self, other: object) -> bool:
        """Return True if all bytes are equal."""
        return (
            isinstance(other, PooledOutput)
            and (self.num_chunks, self.num_cut_tokens) == (other.num_chunks, other.num_cut_tokens)
            and self.values.shape == other.values.shape
            and self.values.tobytes() == other.values.tobytes()
        )

    @property
    def is_finite(self) -> bool:
        """Return True if no value is NaN or infinite."""
        return bool(np.isfinite(self.values).all())

    def describe(self) -> str:
        """Return the beginning of the first vector, and how many numbers there are: ``[0.12, -0.5, ...] (1 x 128)``."""
        num_vectors, width = self.values.shape
        first = [f"{value:.3g}" for value in self.values.reshape(-1)[:_SHOWN_VALUES].tolist()]
        more = ", ..." if self.values.size > len(first) else ""
        return f"[{', '.join(first)}{more}] ({num_vectors} x {width})"


@dataclass(frozen=True)
class PooledKind:
    """Describe the vectors of a loaded pooling model.

    Attributes:
        width: numbers in each vector: dimensions, or classes.
        labels: of the classes, in the vectors' order; empty for a model without classes.
        score_type: vLLM's name of how the model compares two texts: "cross-encoder", "bi-encoder", ...
        uses_separator: True if special tokens stand between the texts of a pair.
    """

    width: int
    labels: tuple[str, ...] = ()
    score_type: str = "bi-encoder"
    uses_separator: bool = True


@dataclass(frozen=True, slots=True)
class RowError:
    """Say why a row has no completion: a stable snake_case type to filter by, and a sentence for a person."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class RowResult(Record):
    """Hold a row's result: one completion per sample, a scored completion, a pooling model's vectors, or an error.

    A row of which samples failed their checks has an error, and completions of the others in their places.

    Attributes:
        num_prompt_tokens: None if the row failed before the engine counted its prompt.
        prompt_logprobs: the prompt's tokens with their log-probabilities; None unless sampling.prompt_logprobs asks for
            them.
        scored: the log-probabilities of the row's given completion; None unless data.completion_column names one.
        num_calls: how many calls the row's program has made; None without a program. What it returned is then `parsed`
            of the one completion, whose tokens are those of all calls.
        call, sample, attempt: as in the id of the request that this is the result of. A record does not hold them: a
            row's own result has none.
        pooled: what a pooling model makes of the row; None where text is generated.
    """

    row: int
    num_prompt_tokens: int | None = None
    completions: tuple[Completion, ...] = ()
    error: RowError | None = None
    prompt_logprobs: TokenLogprobs | None = None
    scored: ScoredCompletion | None = None
    call: int = 0
    sample: int = 0
    attempt: int = 0
    pooled: PooledOutput | None = None
    num_calls: int | None = None

    @property
    def id(self) -> RequestId:
        """Return the id of the request that this is the result of."""
        return RequestId(self.row, self.call, self.sample, self.attempt)

    @property
    def num_generated_tokens(self) -> int:
        return sum(completion.num_tokens for completion in self.completions)

    def with_id(self, id: RequestId) -> RowResult:
        """Return this as the result of a request."""
        if id == self.id:
            return self
        return replace(self, row=id.row, call=id.call, sample=id.sample, attempt=id.attempt)


@dataclass(frozen=True, slots=True)
class UndecodedRow(Record):
    """Hold a finished row without text; its rank decodes the tokens.

    Attributes:
        result: the result, with "" as the text of each completion.
        token_ids: for each completion, the tokens to decode.
        skip_special_tokens: True if the text leaves special tokens out.
        prompt_token_ids: the row's prompt. The engine sends none, since the rank has the prompt already.
    """

    result: RowResult
    token_ids: tuple[list[int], ...]
    skip_special_tokens: bool
    prompt_token_ids: Sequence[int] = ()

    @property
    def id(self) -> RequestId:
        """Return the id of the request that this is the result of."""
        return self.result.id


@dataclass(frozen=True)
class RankManifest:
    """Summarize one rank's part of an attempt; `run.json` holds the fields under these names.

    Attributes:
        sees_rank_0: True if this rank and rank 0 share one run directory.
        num_rows: rows in this rank's journal.
        num_bytes: bytes of this rank's journal.
        num_prompt_tokens: prompt tokens of these rows.
        num_generated_tokens: generated tokens of these rows.
        num_cached_tokens: prompt tokens that the engine found in its prefix cache.
        num_preemptions: sequences that the engine preempted because the KV cache was full.
        num_retries: samples generated again, or continued, by the check that they had failed.
        num_rejected_tokens: generated tokens of samples that failed their checks.
        busy_s: seconds from the first row submitted to the engine to the last row finished.
    """

    rank: int
    node: str
    sees_rank_0: bool = True
    num_rows: int = 0
    num_bytes: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_retries: dict[str, int] = field(default_factory=dict)
    num_rejected_tokens: int = 0
    busy_s: float = 0.0


def make_rejected_result(id: RequestId, why: RowRefused) -> RowResult:
    """Return the result of a rejected request."""
    return RowResult(id.row, error=RowError(why.type, why.message)).with_id(id)


def derive_row_seed(run_seed: int, row: int) -> int:
    """Return the seed of a row's sampling: a 62-bit hash of (run seed, row index).

    vLLM gives sample i of a request the seed plus i. Each sample's seed therefore depends only on (run seed, row
    index, sample index), not on the world size, the order or a restart.
    """
    digest = hashlib.blake2b(b"%d/%d" % (run_seed, row), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def derive_seed(run_seed: int, id: RequestId) -> int:
    """Return the seed of a request's sampling: a 62-bit hash of the run's seed and the request's id.

    That of a row's first request is `derive_row_seed`.
    """
    if id == RequestId(id.row):
        return derive_row_seed(run_seed, id.row)
    digest = hashlib.blake2b(b"%d/%d/%d/%d/%d" % (run_seed, *id), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
