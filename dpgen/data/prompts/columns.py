"""Know which columns of the dataset prompts are made of."""

from __future__ import annotations

from collections.abc import Sequence

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.row_template import check_row_template, template_columns
from dpgen.errors import ConfigError, suggest_name

_COLUMN_KEYS = (
    *("prompt_column", "messages_column", "token_ids_column", "system_prompt_column", "prefill_column"),
    *("chat_template_kwargs_column", "tools_column", "completion_column", "request_column"),
    *("query_column", "document_column", "documents_column"),
)


def check_prompt_columns(config: PromptConfig, columns: Sequence[str]) -> None:
    """Check that the dataset has the columns that prompts are made of, before anything is loaded.

    Raises:
        ConfigError: missing columns, all of them at once; or a template that is broken or names no column.
    """
    mistakes = [
        f"data.{key}: {name!r} is no column of the dataset{suggest_name(name, columns, 'columns')}"
        for key, name in _list_named_columns(config)
        if name not in columns
    ]
    if config.template is not None:
        try:
            check_row_template(config.template, columns)
        except ConfigError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigError(*mistakes)


def select_prompt_columns(config: PromptConfig, columns: Sequence[str]) -> list[str]:
    """Return the dataset's columns that a prompt is made of, each once."""
    in_template = [] if config.template is None else template_columns(config.template, columns)
    return list(dict.fromkeys([*in_template, *(name for _, name in _list_named_columns(config))]))


def _list_named_columns(config: PromptConfig) -> list[tuple[str, str]]:
    """Return the columns that keys name, each with its key."""
    named = [(key, name) for key in _COLUMN_KEYS if (name := getattr(config, key)) is not None]
    return named + [(f"{kind}s_column", name) for kind, names in config.media_columns.items() for name in names]
