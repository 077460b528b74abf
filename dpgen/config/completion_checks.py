"""Declare the section `check`, and check it as far as it shows without the worker processes that run the checks.

Each function yields one line for each mistake: key=value, then what the value must be. The workers find out whether a
schema is one, and whether a function is there, before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpgen.config.checks import LOGPROB_FIELDS
from dpgen.config.schema_source import find_wrong_schema
from dpgen.config.sections import option
from dpgen.errors import find_nearest_name

# The checks, in the order in which they are tried; "truncated" is that of check.continue_truncated.
CHECK_NAMES = ("truncated", "finish_reason", "non_empty", "regex", "max_repetition", "json_schema", "function")
FINISH_REASONS = ("stop", "length", "repetition")
FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class CheckConfig:
    """Hold `check.*`: which completions are rejected, and what becomes of them."""

    non_empty: bool = option("reject a completion whose text is empty or blank, unless it calls a tool", False)
    finish_reason: list[str] | None = option(
        "reject a completion that ended for another reason than these, e.g. [stop]; null takes all"
    )
    json_schema: Any = option(
        "reject a completion that is no JSON value of this JSON Schema (a Markdown fence around it is no error): the "
        "schema itself, its file ('@schemas/answer.json'), or the import path of a Pydantic model "
        "(package.module:Model)"
    )
    regex: str | None = option("reject a completion in whose text this regular expression of Python is found nowhere")
    max_repetition: float | None = option(
        "reject a completion if more than this fraction of its 4-grams (words, CJK characters and signs) occurred in "
        "it before, from 0 to 1"
    )
    function: str | None = option(
        "reject a completion by a function of your own, package.module:name, importable from the working directory; "
        "it gets the row as a dict and the completion (text, finish_reason, reasoning, tool_calls, parsed, num_tokens, "
        "token_ids, sample, attempt), and returns True, False or a reason, or raises; it runs in worker processes"
    )
    timeout_s: float = option(
        "reject a completion whose checks take longer than this many seconds, or kill their worker process",
        10.0,
        minimum=0.1,
    )
    num_workers: int = option("worker processes of each rank for checks; more where the function is slow", 1, minimum=1)
    max_attempts: int = option(
        "the maximum number of times that a sample is generated; then its row gets the error check_failed", 3, minimum=1
    )
    retry_sampling: dict[str, Any] = option(
        "fields of SamplingParams laid over those of a row for its further attempts, e.g. {temperature: 1.0}",
        factory=dict,
    )
    continue_truncated: bool = option(
        "a sample that ended by length continues from its own tokens, with check.retry_sampling.max_tokens or the same "
        "number again, as often as check.max_attempts and the context allow; its checks follow the last piece",
        False,
    )
    keep_rejected: bool = option(
        "add the column rejected_text: the last text of a sample that failed its checks", False
    )

    @property
    def is_used(self) -> bool:
        """Return True if completions are checked, or continued."""
        given = (self.finish_reason, self.json_schema, self.regex, self.max_repetition, self.function)
        return self.non_empty or self.continue_truncated or any(value is not None for value in given)


def find_wrong_check_values(check: CheckConfig, default: CheckConfig) -> Iterator[str]:
    """Yield one line for each wrong value of `check`.

    Args:
        default: the section as it is where nothing is set.
    """
    if check.regex is not None:
        try:
            re.compile(check.regex)
        except re.error as error:
            yield f"check.regex={check.regex!r}: is no regular expression of Python: {error}"
    for reason in check.finish_reason or ():
        if reason not in FINISH_REASONS:
            nearest = find_nearest_name(str(reason), FINISH_REASONS)
            hint = f"; did you mean {nearest!r}?" if nearest else f"; they are {', '.join(FINISH_REASONS)}"
            yield f"check.finish_reason: there is no finish reason {reason!r}{hint}"
    if check.finish_reason == []:
        yield "check.finish_reason=[]: no completion would pass; name the reasons that do, or null for all"
    if check.max_repetition is not None and not 0 <= check.max_repetition <= 1:
        yield f"check.max_repetition={check.max_repetition}: must be from 0 to 1"
    if check.json_schema is not None:
        yield from find_wrong_schema("check.json_schema", check.json_schema, may_be_any=True)
    if check.function is not None and not FUNCTION_NAME.fullmatch(check.function):
        yield f"check.function={check.function!r}: must look like package.module:name"
    yield from _find_wrong_retry_sampling(check.retry_sampling)
    if not check.is_used:
        for name, value in vars(check).items():
            if value != getattr(default, name):
                yield f"check.{name} has no effect: no check is set, nor check.continue_truncated"


def _find_wrong_retry_sampling(sampling: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each field that a further attempt can't have; vLLM checks the others."""
    reasons = dict.fromkeys(LOGPROB_FIELDS, "the result's columns would have two types; set it in sampling")
    reasons |= {
        "n": "each sample is generated again by itself",
        "seed": "each attempt's own comes from run.seed, the row, the sample and the attempt",
        "from_columns": "set sampling.from_columns",
    }
    for name, reason in reasons.items():
        if name in sampling:
            yield f"check.retry_sampling.{name} can't be set: {reason}"
