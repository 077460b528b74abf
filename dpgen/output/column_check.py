"""Check the columns that a configuration names against those of the input, before a model loads."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dpgen.config.media.media_checks import check_media_dir
from dpgen.config.schema import Config
from dpgen.config.yaml.yaml_slips import write_names
from dpgen.data.input_rows import InputRows
from dpgen.data.prompts.columns import check_prompt_columns, select_prompt_columns
from dpgen.errors import ConfigError, suggest_name
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_writer import check_output_columns
from dpgen.output.format_check import check_output_format
from dpgen.output.json_schema.derivation import derive_type


def list_used_columns(config: Config, columns: Sequence[str]) -> list[str]:
    """Return the columns that requests are made from; all of them where each row is given to a program."""
    if config.program.is_used:
        return list(columns)
    others = [name for name in (config.data.lora_column, config.work.hint_column) if name is not None]
    return [*select_prompt_columns(config.prompt, columns), *config.sampling_columns.values(), *others]


def check_columns(config: Config, rows: InputRows) -> None:
    """Raise ConfigError for the first column that the configuration names and the input lacks or can't give."""
    columns = rows.columns
    check_media_dir(config.data.media_dir)
    check_prompt_columns(config.prompt, [*columns, *rows.unreadable])
    kept_columns = [*columns, *rows.unreadable] if config.data.columns is None else config.data.columns
    for name, reason in rows.unreadable.items():
        if name in list_used_columns(config, [*columns, name]) or name in kept_columns:
            raise ConfigError(
                f"column {name!r} can't be read: {reason}. Cast it, or if it isn't needed, leave it out: "
                f"{write_names('data.columns', columns)}"
            )
    named = {f"sampling.from_columns.{field}": column for field, column in config.sampling_columns.items()}
    others = {"data.lora_column": config.data.lora_column, "work.hint_column": config.work.hint_column}
    named |= {key: column for key, column in others.items() if column is not None}
    for key, column in named.items():
        if column not in columns:
            hint = suggest_name(column, columns, "columns")
            raise ConfigError(f"{key}: {column!r} is no column of the dataset{hint}")
    check_output_columns(list(columns), DatasetFormat.from_config(config))


def check_result(config: Config, rows: InputRows) -> list[tuple[int, str]]:
    """Check that the result's files can hold what the kept columns hold, and return notes, each with its log level.

    Raises:
        ConfigError: a column can't be held.
    """
    notes = []
    if config.output.schema is not None and (note := derive_type(config.output.schema).describe_text_parts()):
        notes.append((logging.INFO, note))
    if not rows.is_empty:
        kept_columns = DatasetFormat.from_config(config).select_kept_columns(rows.columns)
        found = check_output_format(rows, kept_columns, config.output.format)
        notes += [(logging.WARNING, note) for note in found]
    return notes
