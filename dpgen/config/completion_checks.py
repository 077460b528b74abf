"""Check the section `check`, as far as it shows without the worker processes that run the checks.

Each function yields one line for each mistake: key=value, then what the value must be. The workers find out whether a
schema is one, and whether a function is there, before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpgen.config.checks import LOGPROB_FIELDS
from dpgen.config.schema_source import find_wrong_schema
from dpgen.errors import find_nearest_name

if TYPE_CHECKING:
    from dpgen.config.sections import CheckConfig

# The checks, in the order in which they are tried; "truncated" is that of check.continue_truncated.
CHECK_NAMES = ("truncated", "finish_reason", "non_empty", "regex", "max_repetition", "json_schema", "function")
FINISH_REASONS = ("stop", "length", "repetition")
FUNCTION_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


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
