"""Encode results as journal records, and decode them: a line of JSON, and large arrays after it as raw bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dpgen.logprobs import ARRAY_TYPES, TokenLogprobs
from dpgen.records import POOLED_TYPE, Completion, PooledOutput, RowError, RowResult, ScoredCompletion, ToolCall

_RARE_FIELDS = (
    "reasoning",
    "parsed",
    "parse_error",
    "rejection",
    "stop_reason",
    "has_null_content",
)  # of a completion, beside its calls


def encode_result(result: RowResult) -> bytes:
    """Return a result as one journal record: a JSON object in ASCII on one line, with short keys, and its arrays.

    The line of a result with arrays lists them, as [whose, field, type, number of values], and ends with a line feed.
    Their little-endian bytes follow in the same order.

    `_SUCCESS` holds a hash over these bytes. A field that is added later must therefore be left out of the record
    when it has its default value, so that records of older runs keep their bytes when decoded and encoded again.
    """
    record: dict[str, Any] = {"row": result.row}
    if result.num_prompt_tokens is not None:
        record["prompt_tokens"] = result.num_prompt_tokens
    if result.error is not None:
        record["error"] = [result.error.type, result.error.message]
    if result.completions:
        record["out"] = [_encode_completion(completion) for completion in result.completions]
    if result.scored is not None:
        record["greedy"] = result.scored.is_greedy
    if (pooled := result.pooled) is not None:
        record["pooled"] = [len(pooled.values), pooled.num_chunks, pooled.num_cut_tokens]
    if result.num_calls is not None:
        record["calls"] = result.num_calls
    arrays: list[list[Any]] = []
    chunks: list[bytes] = []
    for owner, name, data in _iter_arrays(result):
        dtype = _ARRAY_TYPES[name]
        arrays.append([owner, name, dtype, len(data) // np.dtype(dtype).itemsize])
        chunks.append(data)
    if arrays:
        record["arrays"] = arrays
    # ASCII escapes can represent any str, including lone surrogates, which UTF-8 rejects.
    line = json.dumps(record, separators=(",", ":")).encode("ascii")
    return b"".join([line, b"\n", *chunks]) if arrays else line


def decode_result(record: bytes) -> RowResult:
    """Return the result from a record of `encode_result`.

    Raises:
        ValueError, KeyError, TypeError: `encode_result` did not write these bytes, or not all of them are there.
    """
    line, line_feed, data = record.partition(b"\n")  # JSON escapes line feeds, so the first one ends the line
    fields = json.loads(line)
    arrays = _decode_arrays(fields.pop("arrays", []), data)
    if bool(line_feed) != bool(arrays):
        raise ValueError("a record has a line feed if, and only if, arrays follow it")
    pooled = _decode_pooled(arrays.pop(_POOLED, {}), fields.get("pooled"))
    logprobs = {owner: TokenLogprobs(**values) for owner, values in arrays.items()}
    error = RowError(*fields["error"]) if "error" in fields else None
    completions = tuple(
        _decode_completion(logprobs.pop(sample, None), *completion)
        for sample, completion in enumerate(fields.get("out", ()))
    )
    scored = ScoredCompletion(logprobs.pop(_COMPLETION), fields["greedy"]) if "greedy" in fields else None
    prompt_logprobs = logprobs.pop(_PROMPT, None)
    if logprobs:
        raise ValueError(f"the record has arrays that belong to nothing in it: {list(logprobs)}")
    num_calls = fields.get("calls")
    row, num_prompt_tokens = fields["row"], fields.get("prompt_tokens")
    result = RowResult(row, num_prompt_tokens, completions, error, prompt_logprobs, scored, pooled=pooled)
    return result if num_calls is None else replace(result, num_calls=num_calls)


# Whose arrays they are; those of a sample have its number.
_PROMPT, _COMPLETION, _POOLED = "prompt", "completion", "pooled"
_VALUES = "values"  # the only array of `PooledOutput`
_ARRAY_TYPES = {**ARRAY_TYPES, _VALUES: POOLED_TYPE}


def _iter_arrays(result: RowResult) -> Iterator[tuple[int | str, str, bytes]]:
    """Yield all arrays of a result as (whose, field, little-endian bytes)."""
    for owner, logprobs in _iter_logprobs(result):
        yield from ((owner, name, data) for name, data in logprobs.to_bytes().items())
    if result.pooled is not None:
        yield _POOLED, _VALUES, result.pooled.values.astype(POOLED_TYPE, copy=False).tobytes()


def _iter_logprobs(result: RowResult) -> Iterator[tuple[int | str, TokenLogprobs]]:
    """Yield all log-probabilities of a result, with the name of what they belong to."""
    for sample, completion in enumerate(result.completions):
        if completion.logprobs is not None:
            yield sample, completion.logprobs
    if result.prompt_logprobs is not None:
        yield _PROMPT, result.prompt_logprobs
    if result.scored is not None:
        yield _COMPLETION, result.scored.logprobs


def _decode_pooled(arrays: dict[str, np.ndarray], fields: Sequence[int] | None) -> PooledOutput | None:
    """Return the vectors of a record; None if it has none.

    Args:
        fields: number of vectors, chunks and tokens that were cut off.
    """
    if fields is None:
        if arrays:
            raise ValueError("the record has vectors, and does not say how many")
        return None
    num_vectors, num_chunks, num_cut_tokens = fields
    values = arrays[_VALUES]
    width = len(values) // num_vectors if num_vectors else 0
    return PooledOutput(values.reshape(num_vectors, width), num_chunks, num_cut_tokens)


def _decode_arrays(entries: Sequence[Sequence[Any]], data: bytes) -> dict[int | str, dict[str, np.ndarray]]:
    """Return the arrays in the bytes after a record's line, by what they belong to and by field.

    Args:
        entries: the record's list of arrays.
    """
    arrays: dict[int | str, dict[str, np.ndarray]] = {}
    offset = 0
    for owner, name, dtype, count in entries:
        values = arrays.setdefault(owner, {})
        if _ARRAY_TYPES[name] != dtype or name in values or type(count) is not int or count < 0:
            raise ValueError(f"the record's array {owner}.{name} of {count} values of type {dtype} is not valid")
        values[name] = np.frombuffer(data, dtype, count, offset)
        offset += values[name].nbytes
    if offset != len(data):
        raise ValueError(f"the record has {len(data)} bytes of arrays, and its line lists {offset}")
    return arrays


def _encode_completion(completion: Completion) -> list[Any]:
    """Return a completion as a list: the four fields that each has, then an object with those that few have."""
    record = [completion.text, completion.finish_reason, completion.num_tokens, completion.token_ids]
    parts: dict[str, Any] = {}
    for name in _RARE_FIELDS:
        if (value := getattr(completion, name)) is not None:
            parts[name] = value
    if completion.tool_calls:
        parts["tool_calls"] = [[call.id, call.name, call.arguments] for call in completion.tool_calls]
    return [*record, parts] if parts else record


def _decode_completion(
    logprobs: TokenLogprobs | None,
    text: str,
    finish_reason: str | None,
    num_tokens: int,
    token_ids: list[int] | None = None,
    parts: dict[str, Any] | None = None,
) -> Completion:
    parts = dict(parts or {})
    calls = tuple(ToolCall(*call) for call in parts.pop("tool_calls", ()))
    return Completion(text, finish_reason, num_tokens, token_ids, tool_calls=calls, logprobs=logprobs, **parts)
