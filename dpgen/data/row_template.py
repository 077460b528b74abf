"""Make a row's text from a Jinja2 template over its columns: "Q: {{ question }}"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpgen.errors import ConfigError, suggest_name

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def compile_row_template(template: str) -> jinja2.Template:
    """Return the template, ready to render in a sandbox.

    Raises:
        ConfigError: wrong syntax; the message names the line.
    """
    import jinja2

    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"data.template, line {error.lineno}: {error.message}") from error


def check_row_template(template: str, columns: Sequence[str]) -> None:
    """Check a template against the dataset's columns.

    Raises:
        ConfigError: wrong syntax, a name that is not a column, or no column at all.
    """
    compile_row_template(template)
    environment = _environment()
    names = template_columns(template)
    unknown = sorted(names - set(columns) - set(environment.globals))
    if unknown:
        raise ConfigError(
            *(
                f"data.template: {name!r} is no column of the dataset{suggest_name(name, columns, 'columns')}"
                for name in unknown
            )
        )
    if not names & set(columns):
        # Most users who get here wrote a Python format string.
        meant = [name for name in columns if f"{{{name}}}" in template]
        hint = f"write {{{{ {[*meant, *columns, 'column'][0]} }}}}, with two braces"
        raise ConfigError(f"data.template names no column; {hint}; columns: {', '.join(columns)}")


def template_columns(template: str) -> set[str]:
    """Return the names that a template looks up in its row."""
    from jinja2 import meta

    return set(meta.find_undeclared_variables(_environment().parse(template)))


def _environment() -> ImmutableSandboxedEnvironment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_reject_null
    )


def _reject_null(value: Any) -> Any:
    # Jinja writes a null as "None", which nobody would notice in the prompts.
    if value is None:
        raise ValueError("it inserts a null; give the column a default: {{ column or '' }}")
    return value
