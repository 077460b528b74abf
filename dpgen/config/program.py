"""Declare the section `program`, and check it as far as it shows without the function itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpgen.config.completion_checks import FUNCTION_NAME
from dpgen.config.media.media_checks import MEDIA_COLUMN_KEYS
from dpgen.config.prompt import PROMPT_SOURCES
from dpgen.config.schema_source import find_wrong_schema
from dpgen.config.sections import option
from dpgen.errors import suggest_name

if TYPE_CHECKING:
    from dpgen.config.sections import DataConfig, OutputConfig

COLUMN_TYPES = ("string", "integer", "number", "boolean", "json")
# Columns that each row of the result gets from dpgen; see `dpgen.output.columns`.
_RESULT_COLUMNS = ("row_id", "num_calls", "num_prompt_tokens", "num_generated_tokens", "error")
# Arguments that the function gets from dpgen itself.
_RESERVED_OPTIONS = ("row", "llm")


@dataclass(frozen=True)
class ProgramConfig:
    """Hold `program.*`: an async function of yours that makes many calls of the model for each row."""

    function: str | None = option(
        "an async function of the row (a dict) and of the handle llm, package.module:name, importable from the "
        "working directory; it makes the row's calls (llm.chat, llm.complete, llm.samples, llm.json, llm.score, "
        "llm.tool) and returns a dict of columns; each finished call is journaled, and none is repeated after a "
        "restart; dpgen.programs has some ready"
    )
    options: dict[str, Any] = option(
        "passed to the function as keyword arguments, e.g. {num_answers: 8}; part of what the run is", factory=dict
    )
    returns: dict[str, Any] = option(
        "the columns that the function returns: name → string, integer, number, boolean, json (kept as JSON text), or "
        "a JSON Schema, e.g. {final: string, votes: integer}; a row that returns anything else gets the error "
        "program_bad_result; if empty, the whole dict is JSON text in the column program",
        factory=dict,
    )
    timeout_s: float = option(
        "a row whose program takes longer than this many seconds gets the error program_timeout; the waits for the "
        "engine are part of it",
        3600.0,
        minimum=0.1,
    )
    max_calls: int = option(
        "a row whose program makes more calls than this gets the error program_too_many_calls", 100, minimum=1
    )
    max_running: int = option(
        "the maximum number of rows whose programs run at once on a rank; fewer run where they keep the engine full",
        10_000,
        minimum=1,
    )
    num_tool_threads: int = option("how many functions that llm.tool calls may run at once on a rank", 16, minimum=1)

    @property
    def is_used(self) -> bool:
        """Return True if rows are given to a program."""
        return self.function is not None


def to_column_schema(type: Any) -> Any:
    """Return the JSON Schema that an entry of `program.returns` stands for; a value of a named type may be null."""
    if type == "json":
        return {}
    return {"type": [type, "null"]} if isinstance(type, str) else type


def find_wrong_program_values(program: ProgramConfig, default: ProgramConfig) -> Iterator[str]:
    """Yield one line for each wrong value of `program`.

    Args:
        default: the section as it is where nothing is set.
    """
    if program.function is None:
        for name, value in vars(program).items():
            if value != getattr(default, name):
                yield f"program.{name} has no effect: program.function is not set"
        return
    if not FUNCTION_NAME.fullmatch(program.function):
        yield f"program.function={program.function!r}: must look like package.module:name"
    for name in _RESERVED_OPTIONS:
        if name in program.options:
            yield f"program.options.{name} can't be set: dpgen gives the function its row and llm"
    yield from _find_wrong_columns(program.returns)


def _find_wrong_columns(returns: Mapping[str, Any]) -> Iterator[str]:
    for name, type in returns.items():
        key = f"program.returns.{name}"
        if not name.strip():
            yield f"program.returns: {name!r} can't be a column's name"
        elif name in _RESULT_COLUMNS:
            yield f"{key}: the result has a column {name!r} of its own; return it under another name"
        elif isinstance(type, str):
            if type not in COLUMN_TYPES:
                yield f"{key}: there is no type {type!r}{suggest_name(type, COLUMN_TYPES, 'types')}, or a JSON Schema"
        elif not isinstance(type, Mapping):
            yield f"{key}={type!r}: must be one of {', '.join(COLUMN_TYPES)}, or a JSON Schema"
        else:
            yield from find_wrong_schema(key, type, may_be_any=True)


def find_keys_without_effect_on_programs(
    sections: Mapping[str, Any], data: DataConfig, output: OutputConfig
) -> Iterator[str]:
    """Yield one line for each key that is about a row's one prompt or text, where its program makes the calls.

    Args:
        sections: the fields of a `Config`, by name.
        data, output: these sections as they are where nothing is set.
    """
    names = [*PROMPT_SOURCES, "completion_column", "as_chat", "system_prompt_column", "prefill_column"]
    names += ["chat_template_kwargs_column", "tools_column", "continue_final_message", *MEDIA_COLUMN_KEYS]
    keys = [f"data.{name}" for name in names if getattr(sections["data"], name) != getattr(data, name)]
    names = ["explode", "messages", "token_ids", "parse", "schema"]
    keys += [f"output.{name}" for name in names if getattr(sections["output"], name) != getattr(output, name)]
    columns = sections["sampling"].get("from_columns") or {}
    keys += ["sampling.n"] if sections["sampling"].get("n", 1) != 1 else []
    keys += ["sampling.from_columns.n"] if "n" in columns else []
    keys += ["check"] if sections["check"].is_used else []
    for key in keys:
        yield f"{key} has no effect: program.function makes a row's calls, and its result; leave one of them out"
    if sections["data"].format == "openai_batch":
        yield "data.format=openai_batch has requests, and program.function takes rows: leave one of them out"
    if sections["task"] != "generate":
        yield f"task={sections['task']} generates nothing, and program.function makes calls that do: leave one out"
    work = sections["work"]
    if work.order == "prefix" or (work.order == "longest_first" and work.hint_column is None):
        hint = "set work.hint_column, or " if work.order == "longest_first" else ""
        yield (
            f"work.order={work.order} needs prompts, and those of program.function are not known before it runs: "
            f"{hint}leave work.order out"
        )
