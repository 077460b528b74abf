"""Make a row's chat prompt: its messages, and what its columns give besides them.

A null in a column keeps the run's value. So does a blank JSON text, which is how a CSV file has no value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.config.prompt import RESERVED_KWARGS, PromptConfig
from dpgen.config.tools import parse_json_text, parse_tools
from dpgen.data.nested import drop_nulls
from dpgen.data.prompts.chat import ChatPrompt, Message
from dpgen.errors import RowRefused
from dpgen.formatting import describe_type


class ChatPromptBuilder:
    """Make chat prompts of messages and the columns beside them.

    Args:
        config: how a row becomes a prompt.
        has_added_nulls: True if Arrow may have given objects of a column the keys of other rows' objects, as null.
    """

    def __init__(self, config: PromptConfig, has_added_nulls: bool) -> None:
        self._config, self._has_added_nulls = config, has_added_nulls

    def build(self, messages: list[Message], row: Mapping[str, Any]) -> ChatPrompt:
        """Return the row's prompt.

        Args:
            messages: of the conversation, without those that other columns and keys add; changed in place.

        Raises:
            RowRefused: `wrong_type`, `bad_template_kwargs`, `bad_tools`.
        """
        config = self._config
        system_prompt = _read_text(row, config.system_prompt_column)
        if system_prompt is None:
            system_prompt = config.system_prompt
        if system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system_prompt})
        prefill = _read_text(row, config.prefill_column)
        if prefill:
            messages.append({"role": "assistant", "content": prefill})
        template_kwargs = {**config.chat_template_kwargs, **self._read_template_kwargs(row)}
        if tools := self.read_tools(row):
            template_kwargs["tools"] = tools
        is_continued = bool(prefill) or config.continue_final_message
        return {
            "messages": messages,
            "template_kwargs": template_kwargs,
            "is_continued": is_continued,
            "add_generation_prompt": config.add_generation_prompt and not is_continued,
            "add_special_tokens": False,
        }

    def _read_template_kwargs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        column = self._config.chat_template_kwargs_column
        value = self._read_nested(row, column, "bad_template_kwargs")
        if value is None:
            return {}
        try:
            value = parse_json_text(value)
        except ValueError as error:
            raise RowRefused("bad_template_kwargs", f"{column}: {error}") from None
        if not isinstance(value, Mapping):
            raise RowRefused("bad_template_kwargs", f"{column} is {describe_type(value)}, not an object")
        reserved = RESERVED_KWARGS | {"tools"} if self._config.has_tools else RESERVED_KWARGS
        if forbidden := sorted(value.keys() & reserved):
            raise RowRefused("bad_template_kwargs", f"{column} may not hold {forbidden[0]}, which has a key of its own")
        return dict(value)

    def read_tools(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return the row's tools, perhaps none; None if neither the row nor the run has a value.

        Raises:
            RowRefused: `bad_tools`.
        """
        column = self._config.tools_column
        value = self._read_nested(row, column, "bad_tools")
        if value is None:
            tools: list[dict[str, Any]] | None = self._config.tools
            return tools
        try:
            return parse_tools(value)
        except ValueError as error:
            raise RowRefused("bad_tools", f"{column}: {error}") from None

    def _read_nested(self, row: Mapping[str, Any], column: str | None, error_type: str) -> Any:
        """Return the value of a column of objects or JSON text; None if there is none."""
        value = None if column is None else row.get(column)
        if isinstance(value, str):
            return value if value.strip() else None
        if not self._has_added_nulls:
            return value
        try:
            kept = drop_nulls(value)
        except RecursionError:
            raise RowRefused(error_type, f"{column} is nested too deep") from None
        return None if value and kept == {} else kept  # some writers know no null objects


def _read_text(row: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else row.get(column)
    if value is not None and not isinstance(value, str):
        raise RowRefused("wrong_type", f"{column} is {describe_type(value)}, not a string")
    return value
