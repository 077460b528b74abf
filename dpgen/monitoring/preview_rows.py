"""Examine the rows of a run that has not begun: make their requests, count their tokens, and sum up.

- Requests come from the run's own `RequestBuilder`; so do the errors of rows that have none.
- What only the engine finds out is checked here by the same function: prompts that are too long, and unknown token ids.
- Rows are examined in random order, until all are or the time is up: those that were are a fair sample.

Limits: whether a row's sampling parameters are legal is known to vLLM alone, in the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpgen.config.vllm.sampling_numbers import MAX_SAMPLES
from dpgen.data.input_rows import InputRows
from dpgen.data.media.looking import Describe, format_media_text, format_messages
from dpgen.data.media.parts import MediaPart, MediaText
from dpgen.data.openai_batch.requests import select_plain_sampling
from dpgen.data.prompts.token_ids import reject_too_long, reject_unknown_ids
from dpgen.engine.messages import EngineSpec
from dpgen.errors import RowRefused
from dpgen.records import Request
from dpgen.scheduling.programs.first_call import FirstCallBuilder
from dpgen.scheduling.request_builder import RequestBuilder

CHARS_PER_TOKEN = 4  # where only the engine can count tokens
_BATCH_ROWS = 200
_MIN_EXAMINED = 200
_MAX_LISTED_ROWS = 20
_NUM_BARS = 10
# Fields of SamplingParams that bodies of requests have under the same names.
_BODY_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("spaces_between_special_tokens", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs"),
)


@dataclass(frozen=True)
class RowExaminer:
    """Make a row's request, and check it as an engine does.

    Attributes:
        of_model: fields of SamplingParams from the model's generation config.
        max_model_len: tokens of a prompt and its completion together; None where unknown.
        num_ids: of the vocabulary, where the rank knows no tokenizer; None where it does.
    """

    builder: RequestBuilder | FirstCallBuilder
    spec: EngineSpec
    of_model: Mapping[str, Any]
    max_model_len: int | None
    num_ids: int | None = None

    def build(self, row: int, columns: Mapping[str, Any]) -> Request:
        """Return a row's request.

        Raises:
            RowRefused: the row has none.
        """
        return self.builder.build(row, columns)

    def check(self, request: Request) -> None:
        """Raise RowRefused if an engine would reject the request: `prompt_too_long`, `out_of_vocabulary`."""
        token_ids = request.prompt_token_ids
        if token_ids is None:
            return
        if self.num_ids is not None:
            reject_unknown_ids(token_ids, self.num_ids)
        source = request.server_request
        is_cut = source is not None and source.body.get("truncate_prompt_tokens") is not None  # by the engine
        if request.pooling is not None:
            lengths = request.pooling.lengths or (len(token_ids),)
            if self.max_model_len is not None:
                reject_too_long(max(lengths) - 1, self.max_model_len)  # nothing is generated after it
            return
        if self.max_model_len is not None and not is_cut:
            reject_too_long(len(token_ids), self.max_model_len)

    def resolve_sampling(self, request: Request) -> dict[str, Any]:
        """Return all fields of SamplingParams that a row's request has; those of vLLM's own defaults are left out."""
        if request.pooling is not None:
            return {}
        fields = self.spec.resolve_sampling(self.of_model, request)
        return fields | get_own_sampling(request) if request.server_request is not None else fields

    def find_max_tokens(self, request: Request, num_prompt_tokens: int) -> int | None:
        """Return the most tokens that a row's completion can have; None where nothing limits it."""
        if request.pooling is not None:
            return 1  # as a generated token takes a step
        given = self.resolve_sampling(request)["max_tokens"]
        limits = [given] if isinstance(given, int) and 0 < given < 1 << 53 else []
        if self.max_model_len is not None:
            limits.append(max(0, self.max_model_len - num_prompt_tokens))
        return min(limits, default=None)


@dataclass(frozen=True)
class ErrorGroup:
    """Hold the examined rows that fail with one type of error.

    Attributes:
        rows: the first of them by index, at most 20.
        example: the message of the first.
    """

    type: str
    num_rows: int
    rows: list[int]
    example: str


@dataclass(frozen=True)
class TokenCounts:
    """Sum up the tokens of prompts, given completions included.

    Attributes:
        histogram: (fewest tokens, most tokens, rows) of each bar.
        total: over all rows of the input; an estimate where they are a sample.
    """

    mean: float
    min: int
    p50: int
    p90: int
    p99: int
    max: int
    total: int
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True)
class ExaminedRows:
    """Hold what was found of each examined row.

    Attributes:
        row_ids: int64[num_examined], ascending.
        num_tokens: prompt tokens, int64[num_examined]; -1 where the row has no prompt.
        max_tokens: most tokens of the row's completion, int64[num_examined]; -1 where nothing limits it.
        num_samples: completions of the row, int64[num_examined].
        is_sound: bool[num_examined], False where the row fails.
        errors: rows that fail, by type, the most frequent first.
    """

    row_ids: np.ndarray
    num_tokens: np.ndarray
    max_tokens: np.ndarray
    num_samples: np.ndarray
    is_sound: np.ndarray
    errors: list[ErrorGroup]

    def __len__(self) -> int:
        return len(self.row_ids)

    def count_tokens(self, num_rows: int) -> TokenCounts | None:
        """Return the counts of all rows with a prompt, those that are too long included; None if there is none.

        Args:
            num_rows: of the input.
        """
        counts = self.num_tokens[self.num_tokens >= 0]
        if not len(counts):
            return None
        low, p50, p90, p99, high = (
            int(value) for value in np.quantile(counts, [0, 0.5, 0.9, 0.99, 1], method="higher")
        )
        total = round(float(counts.sum()) * num_rows / len(self))
        return TokenCounts(round(float(counts.mean()), 1), low, p50, p90, p99, high, total, _make_histogram(counts))


def examine_rows(
    examiner: RowExaminer,
    rows: InputRows,
    columns: Sequence[str],
    max_rows: int,
    max_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> ExaminedRows:
    """Examine all rows, or a random sample.

    Args:
        columns: those that requests are made from.
        max_rows: the most rows to examine.
        max_s: seconds after which no further rows are examined.
    """
    order = np.random.default_rng(0).choice(len(rows), min(max_rows, len(rows)), replace=False)
    found: list[tuple[int, int, int, int, bool]] = []
    errors: dict[str, list[tuple[int, str]]] = {}
    started_s = clock()
    for start in range(0, len(order), _BATCH_ROWS):
        if len(found) >= _MIN_EXAMINED and clock() - started_s > max_s:
            break
        row_ids = np.sort(order[start : start + _BATCH_ROWS])
        for row, values in zip(row_ids.tolist(), rows.iter_rows(row_ids, columns), strict=True):
            num_tokens, max_tokens, num_samples, error = -1, -1, 1, None
            try:
                request = examiner.build(row, values)
                num_tokens = count_prompt_tokens(request)
                limit = examiner.find_max_tokens(request, num_tokens)
                max_tokens = -1 if limit is None else limit
                num_samples = _to_count(examiner.resolve_sampling(request).get("n"))
                examiner.check(request)
            except RowRefused as refused:
                error = refused
                errors.setdefault(refused.type, []).append((row, refused.message))
            found.append((row, num_tokens, max_tokens, num_samples, error is None))
    table = np.array(sorted(found), dtype=np.int64).reshape(-1, 5).T
    row_ids, counts, limits, samples, is_sound = table
    return ExaminedRows(row_ids, counts, limits, samples, is_sound.astype(bool), _group_errors(errors))


def count_prompt_tokens(request: Request) -> int:
    """Return the prompt's tokens, by its characters where only the engine can count them."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return -(-len(format_untokenized(request.prompt)) // CHARS_PER_TOKEN)


def format_untokenized(prompt: Any, describe: Describe = MediaPart.describe) -> str:
    """Return the text of a prompt that is not tokenized yet: as it is, or message by message."""
    if isinstance(prompt, MediaText):
        return format_media_text(prompt, describe)
    return prompt if isinstance(prompt, str) else format_messages(prompt["messages"], describe)


def get_own_sampling(request: Request) -> dict[str, Any]:
    """Return the fields of SamplingParams that a row's request of a batch file names, as they stand there."""
    if request.server_request is None:
        return {}
    body = request.server_request.body
    named = {name: body[name] for name in _BODY_SAMPLING if body.get(name) is not None}
    own = select_plain_sampling(request.server_request)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        own.pop("max_tokens", None)
    return named | own


def _to_count(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value <= MAX_SAMPLES else 1


def _group_errors(errors: Mapping[str, list[tuple[int, str]]]) -> list[ErrorGroup]:
    groups = []
    for type, found in errors.items():
        found = sorted(found)
        groups.append(ErrorGroup(type, len(found), [row for row, _ in found[:_MAX_LISTED_ROWS]], found[0][1]))
    return sorted(groups, key=lambda group: (-group.num_rows, group.type))


def _make_histogram(counts: np.ndarray) -> list[tuple[int, int, int]]:
    """Return bars of equal width, or of equal ratio where the longest prompt is many times the median."""
    low, high = int(counts.min()), int(counts.max())
    num_bars = min(_NUM_BARS, high - low + 1)
    if high > 8 * max(1.0, float(np.median(counts))):
        edges = np.geomspace(max(1, low), high + 1, num_bars + 1)
    else:
        edges = np.linspace(low, high + 1, num_bars + 1)
    bounds = np.unique(np.ceil(edges).astype(np.int64))
    bounds[0], bounds[-1] = low, high + 1
    bars, _ = np.histogram(counts, bounds)
    return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(bounds, bounds[1:], bars, strict=False)]
