"""Check one completion: what the rank does itself, the factory of its workers, and what users' functions get.

- The checks are tried in the order of `CHECK_NAMES`; the first one that fails gives the reason.
- The first two only look at the completion, which takes less time than to send it, so the rank does them. All others
  may take long, or for ever: a regular expression, also in a schema, and a function. Workers do them.
- Whatever a check raises rejects that completion alone. A crash or a hang is the pool's matter.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpgen.config.completion_checks import CheckConfig
from dpgen.config.sections import OutputConfig
from dpgen.engine.checking.quick_schema import make_quick_yes
from dpgen.engine.parsing.json_text import JsonText, read_json
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
        parsed: as in `Completion`; None also where the workers read the text as JSON themselves.
        for_function: None where there is no function.
    """

    text: str
    parsed: str | None = None
    for_function: FunctionInput | None = None


class CheckAnswer(NamedTuple):
    """Hold what workers find of one completion.

    Attributes:
        rejection: None if it passes.
        parsed, parse_error: as in `Completion`, where the workers read the text as JSON.
    """

    rejection: Rejection | None
    parsed: str | None = None
    parse_error: str | None = None


class _Subject:
    """Hold a completion that is being checked, with its JSON value, which is read once."""

    def __init__(self, task: CheckTask) -> None:
        self.task = task

    @functools.cached_property
    def json(self) -> JsonText:
        """Return the JSON value of the completion, or why it has none."""
        parsed = self.task.parsed
        return read_json(self.task.text) if parsed is None else JsonText(json.loads(parsed), parsed)


_Check = Callable[[_Subject], str | None]  # the reason to reject a completion, None if it passes


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


def checks_parse_json(config: CheckConfig, output: OutputConfig) -> bool:
    """Return True if the workers that check texts also read them as JSON: one message where there would be two.

    vLLM's parsers have workers of their own, since each imports vLLM.
    """
    return output.parses_json and not output.parses_with_vllm and bool(list_worker_checks(config))


def start(config: CheckConfig, parses_json: bool = False) -> tuple[Callable[[CheckTask], CheckAnswer], None]:
    """Return the handler of check tasks; the factory of a pool's workers.

    Args:
        parses_json: read texts as JSON, too (`output.parse=json`).

    Raises:
        ValueError: the JSON Schema is none, or there is no such function.
    """
    checks: dict[str, _Check] = {}
    if config.regex is not None:
        pattern = re.compile(config.regex)
        checks["regex"] = lambda subject: None if pattern.search(subject.task.text) else "it is found nowhere"
    if config.max_repetition is not None:
        limit = config.max_repetition
        checks["max_repetition"] = lambda subject: _check_repetition(subject.task.text, limit)
    if config.json_schema is not None:
        checks["json_schema"] = make_schema_check(config.json_schema)
    if config.function is not None:
        checks["function"] = _make_function_check(config.function, has_parsed=parses_json)

    def handle(task: CheckTask) -> CheckAnswer:
        subject = _Subject(task)
        if not parses_json:
            return CheckAnswer(_find_rejection(checks, subject))
        parsed, parse_error = subject.json.canonical, subject.json.error
        return CheckAnswer(_find_rejection(checks, subject), parsed, parse_error)

    return handle, None


def _find_rejection(checks: Mapping[str, _Check], subject: _Subject) -> Rejection | None:
    for name, check in checks.items():
        try:
            reason = check(subject)
        except Exception as error:  # noqa: BLE001 - foreign code: one bad completion costs one attempt
            reason = f"it raised {type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        if reason is not None:
            return Rejection(name, reason[:_MAX_REASON_CHARS])
    return None


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
    validator, is_sure = validator_class(schema), make_quick_yes(schema)

    def check(subject: _Subject) -> str | None:
        found = subject.json
        if found.error is not None:
            return found.error
        if is_sure(found.value):
            return None
        problem = exceptions.best_match(validator.iter_errors(found.value))
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


def _make_function_check(name: str, *, has_parsed: bool) -> _Check:
    """Return the check of a user's function.

    Args:
        has_parsed: the function gets the text's JSON value, also where the task doesn't have it.
    """
    function = load_function("check.function", name)
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"check.function={name}: is async, and must return True, False or a reason by itself")

    def check(subject: _Subject) -> str | None:
        task = subject.task
        assert task.for_function is not None
        columns, finish_reason, num_tokens, reasoning, tool_calls, token_ids, sample, attempt = task.for_function
        shown = CheckedCompletion(
            task.text,
            finish_reason,
            num_tokens,
            reasoning,
            tool_calls,
            subject.json.value if has_parsed or task.parsed is not None else None,
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
    if isinstance(value, bool) or (type(value).__module__ == "numpy" and str(getattr(value, "dtype", "")) == "bool"):
        return None if value else "it returned False"
    return f"it returned {type(value).__name__}, and must return True, False or a reason"
