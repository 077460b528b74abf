"""Load the run's program: the user's function, with its options, checked before a model loads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dpgen.config.program import ProgramConfig
from dpgen.data.prompts.render import RenderedPrompt
from dpgen.errors import ConfigError
from dpgen.imports import load_function, look_in_import_folders
from dpgen.output.json_schema.derivation import derive_returned_type
from dpgen.scheduling.programs.running import ProgramSpec


def load_program(config: ProgramConfig) -> ProgramSpec | None:
    """Return the program of a run; None if it has none.

    Raises:
        ConfigError: there is no such function, it is not async, or it does not take the options.
    """
    if config.function is None:
        return None
    look_in_import_folders()
    try:
        function = load_function("program.function", config.function)
    except ValueError as error:
        raise ConfigError(str(error)) from error.__cause__
    where = f"program.function={config.function}"
    if not inspect.iscoroutinefunction(function) and not inspect.iscoroutinefunction(type(function).__call__):
        raise ConfigError(
            f"{where}: must be an async function: async def {config.function.rpartition(':')[2]}(row, llm)"
        )
    try:
        inspect.signature(function).bind({}, None, **config.options)
    except TypeError as error:
        given = ", ".join(["row", "llm", *(f"{name}=..." for name in config.options)])
        raise ConfigError(f"{where}: can't be called with ({given}), as program.options has it: {error}") from None
    except ValueError:  # of a callable that tells no signature
        pass
    returned = derive_returned_type(config.returns)
    check = (lambda value: None) if returned is None else returned.convert
    return ProgramSpec(function, dict(config.options), config.timeout_s, config.max_calls, check)


def pass_columns(columns: Mapping[str, Any]) -> RenderedPrompt:
    """Return a row's columns in place of a prompt, for its program; the `render` of rows' own requests."""
    return RenderedPrompt(None, columns)
