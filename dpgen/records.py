"""What passes between the rooms: requests down to the engine, results up from it, and their form in the journal."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dpgen.errors import RowRefused


@dataclass(frozen=True, slots=True)
class Request:
    """One row, ready to generate.

    Attributes:
        row: the row's index in the input; a row's identity, everywhere.
        prompt_token_ids: the prompt; None where only the engine's own tokenizer can make it from `prompt`.
        prompt: the text, or the chat messages, where `prompt_token_ids` is None.
        sampling: fields of SamplingParams that are this row's own (of its entry of sampling_by_rank, its seed, and
            those taken from columns).
    """

    row: int
    prompt_token_ids: list[int] | None
    prompt: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample of a row.

    Attributes:
        text: the generated text.
        finish_reason: vLLM's word: "stop", "length", ...
        num_tokens: how many tokens were generated.
        token_ids: those tokens, where they were asked for.
    """

    text: str
    finish_reason: str | None
    num_tokens: int
    token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no completion: a stable word to filter by, and a sentence for a person."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class RowResult:
    """What became of a row: completions (one a sample), or an error."""

    row: int
    num_prompt_tokens: int | None = None
    completions: tuple[Completion, ...] = ()
    error: RowError | None = None

    @property
    def num_generated_tokens(self) -> int:
        return sum(each.num_tokens for each in self.completions)


def make_rejected_result(row: int, why: RowRefused) -> RowResult:
    """The result of a row that was refused."""
    return RowResult(row, error=RowError(why.type, why.message))


def encode_result(result: RowResult) -> bytes:
    """A result as one journal record: JSON in UTF-8, short keys, one object."""
    record: dict[str, Any] = {"row": result.row}
    if result.num_prompt_tokens is not None:
        record["prompt_tokens"] = result.num_prompt_tokens
    if result.error is not None:
        record["error"] = [result.error.type, result.error.message]
    if result.completions:
        record["out"] = [[c.text, c.finish_reason, c.num_tokens, c.token_ids] for c in result.completions]
    # ASCII escapes carry anything a str can hold, lone surrogates too, which UTF-8 would refuse.
    return json.dumps(record, separators=(",", ":")).encode("ascii")


def decode_result(record: bytes) -> RowResult:
    """The result that `encode_result` wrote.

    Raises:
        ValueError, KeyError, TypeError: bytes that `encode_result` did not write.
    """
    found = json.loads(record)
    error = RowError(*found["error"]) if "error" in found else None
    completions = tuple(Completion(*each) for each in found.get("out", ()))
    return RowResult(found["row"], found.get("prompt_tokens"), completions, error)


def derive_row_seed(run_seed: int, row: int) -> int:
    """The seed that a row's sampling starts from: a 62-bit hash of (run seed, row index).

    vLLM gives sample i of a request the seed plus i, so that each sample's seed is a function of (run seed, row
    index, sample index) and of nothing else: not of the world size, the order, or a restart.
    """
    digest = hashlib.blake2b(b"%d/%d" % (run_seed, row), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
