"""Check one completion: what the rank does itself, the factory of its workers, and what users' functions get.

- The checks are tried in the order of `CHECK_NAMES`; the first one that fails gives the reason.
- The first two only look at the completion, which takes less time than to send it, so the rank does them. All others
  may take long, or for ever: a regular expression, also in a schema, and a function. Workers do them.
- Whatever a check raises rejects that completion alone. A crash or a hang is the pool's matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpgen.config.sections import CheckConfig
from dpgen.engine.parsing.json_text import describe_json_error, extract_json
from dpgen.imports import load_function
from dpgen.journal.attempts import Rejection
from dpgen.records import Completion, ToolCall

_NGRAM_SIZE = 4
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")  # a CJK character is a word
_MAX_REASON_CHARS = 500


@dataclass(frozen=True)
class CheckedCompletion:
    """Show a completion to a function of the user (`check.function`).

    Attributes:
        text: as in the column generated_text.
        finish_reason: vLLM's: "stop", "length", ...
        num_tokens: number of generated tokens.
        reasoning: as in the column of this name; None for none.
        tool_calls: each with id, name and arguments (JSON text).
        parsed: the value of the column parsed; None unless output.parse=json found one.
        token_ids: the generated tokens; None unless output.token_ids, sampling.logprobs or check.continue_truncated
            asks for them.
        sample: number of the sample, from 0.
        attempt: number of the attempt, from 0.
    """

    text: str
    finish_reason: str | None
    num_tokens: int
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    parsed: Any = None
    token_ids: list[int] | None = None
    sample: int = 0
    attempt: int = 0


class FunctionInput(NamedTuple):
    """Hold what a user's function gets beside the text; see `CheckedCompletion`.

    Attributes:
        columns: the input's row.
    """

    columns: Mapping[str, Any]
    finish_reason: str | None
    num_tokens: int
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: list[int] | None = None
    sample: int = 0
    attempt: int = 0


class CheckTask(NamedTuple):
    """Hold what workers need of one completion.

    Attributes:
        parsed: as in `Completion`.
        for_function: None where there is no function.
    """

    text: str
    parsed: str | None = None
    for_function: FunctionInput | None = None


_Check = Callable[[CheckTask], str | None]  # the reason to reject a completion, None if it passes


def make_quick_check(config: CheckConfig) -> Callable[[Completion], Rejection | None]:
    """Return the checks that the rank does itself."""
    allowed, non_empty = config.finish_reason, config.non_empty

    def check(completion: Completion) -> Rejection | None:
        reason = completion.finish_reason
        if allowed is not None and reason not in allowed:
            return Rejection("finish_reason", f"it ended by {reason}, not by {' or '.join(allowed)}")
        if non_empty and not completion.text.strip() and not completion.tool_calls:
            return Rejection("non_empty", "the text is empty")
        return None

    return check


def list_worker_checks(config: CheckConfig) -> list[str]:
    """Return the names of the checks that workers do, in their order; without any there are no workers."""
    names = ("regex", "max_repetition", "json_schema", "function")
    return [name for name in names if getattr(config, name) is not None]


def start(config: CheckConfig) -> tuple[Callable[[CheckTask], Rejection | None], None]:
    """Return the handler of check tasks; the factory of a pool's workers.

    Raises:
        ValueError: the JSON Schema is none, or there is no such function.
    """
    checks: dict[str, _Check] = {}
    if config.regex is not None:
        pattern = re.compile(config.regex)
        checks["regex"] = lambda task: None if pattern.search(task.text) else "it is found nowhere"
    if config.max_repetition is not None:
        limit = config.max_repetition
        checks["max_repetition"] = lambda task: _check_repetition(task.text, limit)
    if config.json_schema is not None:
        checks["json_schema"] = make_schema_check(config.json_schema)
    if config.function is not None:
        checks["function"] = _make_function_check(config.function)

    def handle(task: CheckTask) -> Rejection | None:
        for name, check in checks.items():
            try:
                reason = check(task)
            except Exception as error:  # noqa: BLE001 - foreign code: one bad completion costs one attempt
                reason = f"it raised {type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
            if reason is not None:
                return Rejection(name, reason[:_MAX_REASON_CHARS])
        return None

    return handle, None


def compute_repetition(text: str) -> float:
    """Return the fraction of a text's 4-grams that occurred in it before; 0 for a text with fewer than five words."""
    words = _WORD.findall(text)
    ngrams = list(zip(*(words[start:] for start in range(_NGRAM_SIZE)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _check_repetition(text: str, limit: float) -> str | None:
    repetition = compute_repetition(text)
    return None if repetition <= limit else f"{100 * repetition:.0f} % of its 4-grams repeat earlier ones"


def make_schema_check(schema: Any) -> _Check:
    """Return the check of completions by a JSON Schema.

    Raises:
        ValueError: it is no JSON Schema, or refers to another one.
    """
    from jsonschema import exceptions, validators

    validator_class = validators.validator_for(schema)
    try:
        validator_class.check_schema(schema)
    except exceptions.SchemaError as error:
        raise ValueError(f"check.json_schema is no JSON Schema, at {error.json_path}: {error.message}") from None
    _reject_foreign_references(schema)
    validator = validator_class(schema)

    def check(task: CheckTask) -> str | None:
        text = task.text
        try:
            value = json.loads(task.parsed or extract_json(text))
        except (ValueError, RecursionError) as error:
            return f"no JSON: {describe_json_error(error, text)}"
        problem = exceptions.best_match(validator.iter_errors(value))
        return None if problem is None else f"at {problem.json_path}: {problem.message}"

    return check


def _reject_foreign_references(schema: Any) -> None:
    """Raise ValueError for a reference to another document: nothing is fetched."""
    for key, value in schema.items() if isinstance(schema, Mapping) else ():
        is_foreign = key in ("$ref", "$dynamicRef") and isinstance(value, str) and not value.startswith("#")
        if is_foreign:
            raise ValueError(f"check.json_schema refers to {value}: put that schema under $defs, and refer to it there")
        _reject_foreign_references(value)
    for item in schema if isinstance(schema, list) else ():
        _reject_foreign_references(item)


def _make_function_check(name: str) -> _Check:
    function = load_function("check.function", name)

    def check(task: CheckTask) -> str | None:
        assert task.for_function is not None
        columns, finish_reason, num_tokens, reasoning, tool_calls, token_ids, sample, attempt = task.for_function
        shown = CheckedCompletion(
            task.text,
            finish_reason,
            num_tokens,
            reasoning,
            tool_calls,
            None if task.parsed is None else json.loads(task.parsed),
            token_ids,
            sample,
            attempt,
        )
        return _read_verdict(function(dict(columns), shown))

    return check


def _read_verdict(value: Any) -> str | None:
    """Return the reason in what a user's function has returned; None if the completion passes."""
    if isinstance(value, str):
        return value or "it returned an empty reason"
    if isinstance(value, bool) or type(value).__module__ == "numpy":
        return None if value else "it returned False"
    return f"it returned {type(value).__name__}, and must return True, False or a reason"
