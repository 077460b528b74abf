"""Make a row's text from a Jinja2 template over its columns: "Q: {{ question }}".

- A column is a variable of its name. `row` is the whole row, for other names: {{ row['a b'] }}. A column of the name
  `row` takes its place.
- A column comes before the function of Jinja that has its name: {{ range }} is the column. A name that a template calls
  is the function, since no column can be called: range(3).
- The keys of a nested value come before the methods of Python's dict: {{ order.items }} is the key, where there is one.
- What no prompt should hold is an error, and not inserted: a null, a method, an iterator, bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dpgen.errors import ConfigError, find_nearest_name, suggest_name
from dpgen.formatting import describe_type

if TYPE_CHECKING:
    import jinja2
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_ROW = "row"
_SELF = "self"  # Jinja's own: no variable can have this name
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class RowTemplate:
    """Hold a compiled template, and the functions of Jinja that it calls."""

    template: jinja2.Template
    functions: Mapping[str, Callable[..., Any]]

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the row's text. Raises whatever the template raises, which is a program."""
        return self.template.render({_ROW: dict(row), **row, **self.functions})


def compile_row_template(template: str) -> RowTemplate:
    """Return the template, ready to render in a sandbox.

    Raises:
        ConfigError: wrong syntax; the message names the line.
    """
    import jinja2

    try:
        compiled = _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"data.template, line {error.lineno}: {error.message}") from error
    return RowTemplate(compiled, {name: compiled.globals[name] for name in _find_functions(_parse(template))})


def check_row_template(template: str, columns: Sequence[str]) -> None:
    """Check a template against the dataset's columns.

    Raises:
        ConfigError: wrong syntax, a name that is not a column, or no column at all.
    """
    try:
        compile_row_template(template)
    except ConfigError as error:
        raise ConfigError(f"{error}{_hint_at_row(template, columns)}") from error
    names = _find_names(template)
    used = set(template_columns(template, columns))
    unknown = sorted(names - set(columns) - set(_environment().globals) - {_ROW})
    keys = sorted(set(_find_row_keys(template, columns) or ()) - set(columns))
    taken = sorted(_find_taken_names(template) & set(columns))
    if unknown or keys or taken:
        raise ConfigError(
            *(
                f"data.template: {name!r} is a name of Jinja's, too; write the column as {{{{ {_ROW}[{name!r}] }}}}"
                for name in taken
            ),
            *(
                f"data.template: {name!r} is no column of the dataset{_suggest(template, name, columns)}"
                for name in unknown
            ),
            *(
                f"data.template: {_ROW}[{key!r}]: {key!r} is no column of the dataset"
                f"{suggest_name(key, columns, 'columns')}"
                for key in keys
            ),
        )
    if not used:
        # Most users who get here wrote a Python format string.
        meant = [name for name in columns if f"{{{name}}}" in template]
        hint = f"write {{{{ {_to_expression([*meant, *columns, 'column'][0])} }}}}, with two braces"
        raise ConfigError(f"data.template names no column; {hint}; columns: {', '.join(columns)}")


def template_columns(template: str, columns: Sequence[str]) -> list[str]:
    """Return those of the dataset's columns that a template needs, all of them if it uses `row` as a whole."""
    names = _find_names(template)
    keys: set[str] | None = set()
    if _ROW in names and _ROW not in columns:
        keys = _find_row_keys(template, columns)
    return [name for name in columns if keys is None or name in names or name in keys]


def _parse(template: str) -> nodes.Template:
    """Return a template's syntax tree, in which the names of Jinja's functions are names as any others."""
    environment = _environment().overlay()
    environment.globals = {}
    return environment.parse(template)


def _find_names(template: str) -> set[str]:
    """Return the names that a template looks up outside of itself, but for the functions that it calls."""
    from jinja2 import meta

    tree = _parse(template)
    return meta.find_undeclared_variables(tree) - _find_functions(tree).keys()


def _find_functions(tree: nodes.Template) -> Counter[str]:
    """Return the functions of Jinja's that a template calls, each with the number of calls."""
    from jinja2 import nodes

    calls = Counter(call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name))
    return Counter({name: num for name, num in calls.items() if name in _environment().globals})


def _find_taken_names(template: str) -> set[str]:
    """Return the names in a template that stand for something of Jinja's where a column may be meant."""
    from jinja2 import nodes
    from jinja2.compiler import find_undeclared

    tree = _parse(template)
    uses = Counter(name.name for name in tree.find_all(nodes.Name))
    calls = _find_functions(tree)
    set_here = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    return {name for name in calls if calls[name] < uses[name]} - set_here | find_undeclared(tree.body, [_SELF])


def _find_row_keys(template: str, columns: Sequence[str]) -> set[str] | None:
    """Return the keys that a template looks up in `row`; None if it uses `row` in another way."""
    from jinja2 import nodes

    if _ROW in columns or _ROW not in _find_names(template):
        return set()
    tree = _parse(template)
    num_uses = sum(node.name == _ROW for node in tree.find_all(nodes.Name))
    keys: list[str] = []
    for node in tree.find_all((nodes.Getitem, nodes.Getattr)):
        assert isinstance(node, nodes.Getitem | nodes.Getattr)
        if not isinstance(node.node, nodes.Name) or node.node.name != _ROW:
            continue
        key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        if isinstance(key, str) and (key in columns or not hasattr(dict, key)):
            keys.append(key)
    return set(keys) if len(keys) == num_uses else None


def _suggest(template: str, name: str, columns: Sequence[str]) -> str:
    """Return the end of the sentence about a name that is no column."""
    nearest = find_nearest_name(name, columns)
    if nearest is not None and _is_variable(nearest):
        return suggest_name(name, columns, "columns")
    return _hint_at_row(template, columns) or suggest_name(
        name, [_to_expression(column) for column in columns], "columns"
    )


def _hint_at_row(template: str, columns: Sequence[str]) -> str:
    """Return how to write the first column in a template whose name is no variable; "" if there is none."""
    meant = [name for name in columns if not _is_variable(name) and name in template]
    if not meant:
        return ""
    return f"; the column {meant[0]!r} has a name that is no variable, write {{{{ {_to_expression(meant[0])} }}}}"


def _to_expression(column: str) -> str:
    return column if _is_variable(column) else f"{_ROW}[{column!r}]"


def _is_variable(name: str) -> bool:
    """Return True if a template can name a column without `row`."""
    from jinja2 import meta

    if not _IDENTIFIER.fullmatch(name):
        return False
    try:
        return meta.find_undeclared_variables(_parse(f"{{{{ {name} }}}}")) == {name}
    except Exception:  # noqa: BLE001 - a word of Jinja's, e.g. "if"
        return False


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class RowEnvironment(ImmutableSandboxedEnvironment):
        """Look up keys before methods."""

        def getattr(self, obj: Any, attribute: str) -> Any:
            if isinstance(obj, Mapping) and attribute in obj:
                return obj[attribute]
            return super().getattr(obj, attribute)

    return RowEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_reject_unprintable)


def _reject_unprintable(value: Any) -> Any:
    """Return a value that a template inserts.

    Raises:
        ValueError: Jinja would write something that nobody meant and nobody would notice in the prompts.
    """
    import jinja2

    if value is None:
        raise ValueError("it inserts a null; give the column a default: {{ column or '' }}")
    if isinstance(value, jinja2.Undefined):
        return value  # Jinja raises its own error, which names the variable
    if callable(value):
        name = getattr(value, "__name__", describe_type(value))
        raise ValueError(f"it inserts the function or method {name!r}: call it, or look up a key that the row has")
    if isinstance(value, Iterator | KeysView | ValuesView | ItemsView):
        raise ValueError(f"it inserts {describe_type(value)}, not its values: add | list, or | join(', ')")
    if isinstance(value, bytes | bytearray | memoryview):
        raise ValueError("it inserts bytes: decode them, e.g. {{ column.decode() }}")
    return value
