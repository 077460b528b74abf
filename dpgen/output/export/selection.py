"""Choose what an export holds: successful rows or all, which columns, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpgen.errors import ConfigError, suggest_name

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Selection:
    """Say which rows and columns an export holds.

    Attributes:
        columns: names in the dataset, in the export's order; None for all.
        renames: texts of the form ``OLD=NEW``.
        only_successful: leave out rows with an error.
    """

    columns: Sequence[str] | None = None
    renames: Sequence[str] = ()
    only_successful: bool = False

    def resolve(self, names: Sequence[str], default: Sequence[str] | None = None) -> dict[str, str]:
        """Return the export's columns: name in the dataset → name in the export.

        Args:
            names: the dataset's columns.
            default: those that are exported where `columns` is None; None for all.

        Raises:
            ConfigError: there is no such column, or two have the same name; all mistakes at once.
        """
        columns = (names if default is None else default) if self.columns is None else self.columns
        mistakes = [
            f"--columns: there is no column {name!r}{suggest_name(name, names, 'columns')}"
            for name in columns
            if name not in names
        ]
        chosen = {name: name for name in columns}
        mistakes += [f"--columns: {name!r} is there twice" for name in chosen if list(columns).count(name) > 1]
        for text in self.renames:
            splits = [(text[:i], text[i + 1 :]) for i, character in enumerate(text) if character == "="]
            known = [(old, new) for old, new in splits if old in chosen]
            if not splits:
                mistakes.append(f"--rename {text}: write OLD=NEW")
            elif not known:
                old = splits[0][0]
                what = "is not among --columns" if old in names else "is no column of the dataset"
                mistakes.append(f"--rename {text}: {old!r} {what}{suggest_name(old, list(chosen), 'columns')}")
            elif not known[0][1]:
                mistakes.append(f"--rename {text}: the new name is empty")
            else:
                chosen[known[0][0]] = known[0][1]
        new_names = list(chosen.values())
        mistakes += [
            f"--rename: two columns would be called {name!r}"
            for name in dict.fromkeys(new_names)
            if new_names.count(name) > 1
        ]
        if not columns:
            mistakes.append("--columns: name at least one column")
        if mistakes:
            raise ConfigError(*mistakes)
        return chosen


def select_rows(table: pa.Table, *, only_successful: bool, has_answer: str | None = None) -> pa.Table:
    """Return the rows of a table that are exported.

    Args:
        only_successful: leave out rows with an error.
        has_answer: a column that must not be null; None for no such column.
    """
    if only_successful:
        table = table.filter(table["error"].is_null())
    return table if has_answer is None else table.filter(table[has_answer].is_valid())
