"""Read the package's source code without importing it: its files, and what each of them imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from helpers.jobs import REPO

PACKAGE = "dpgen"


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        target: dotted and absolute; `from a import b` gives "a.b", whether b is a module or not.
        text: the import as it is written, for messages.
        name: the name that the importing file gets; empty for an import by function call.
        meaning: dotted, what that name stands for: `import a.b` binds a, `import a.b as c` binds a.b.
    """

    line: int
    target: str
    text: str
    name: str = ""
    meaning: str = ""


def list_package_files() -> list[str]:
    """Return every Python file of the package, relative to the repository, sorted."""
    return sorted(path.relative_to(REPO).as_posix() for path in (REPO / PACKAGE).rglob("*.py"))


def read_source(path: str) -> str:
    return (REPO / path).read_text(encoding="utf-8")


@cache
def find_imports(source: str, path: str) -> tuple[Import, ...]:
    """Return all imports of a file by line: those in functions and in TYPE_CHECKING blocks, too.

    `importlib.import_module("name")` and `__import__("name")` count; of an f-string, the text before its first value.
    """
    imports: list[Import] = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            imports += (_from_plain_import(node.lineno, alias) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imports += _iter_names_of_from_import(node, path)
        elif isinstance(node, ast.Call) and (target := _find_target_of_call(node)):
            imports.append(Import(node.lineno, target, ast.unparse(node)))
    return tuple(sorted(imports, key=lambda imported: imported.line))


def is_within(name: str, package: str) -> bool:
    """Return True if the dotted name is the package or lies in it."""
    return name == package or name.startswith(f"{package}.")


def _from_plain_import(line: int, alias: ast.alias) -> Import:
    if alias.asname:
        return Import(line, alias.name, f"import {alias.name} as {alias.asname}", alias.asname, alias.name)
    root = alias.name.partition(".")[0]
    return Import(line, alias.name, f"import {alias.name}", root, root)


def _iter_names_of_from_import(node: ast.ImportFrom, path: str) -> Iterator[Import]:
    base = node.module or ""
    if node.level:
        folders = Path(path).parent.parts
        base = ".".join([*folders[: len(folders) - node.level + 1], *filter(None, [node.module])])
    for alias in node.names:
        text = f"from {'.' * node.level}{node.module or ''} import {alias.name}"
        target = f"{base}.{alias.name}"
        yield Import(node.lineno, target, text, alias.asname or alias.name, target)


def _find_target_of_call(node: ast.Call) -> str | None:
    name = ast.unparse(node.func)
    if name.rpartition(".")[2] not in ("import_module", "__import__") or not node.args:
        return None
    target = node.args[0]
    if isinstance(target, ast.JoinedStr) and target.values:
        target = target.values[0]
    return target.value.rstrip(".") if isinstance(target, ast.Constant) and isinstance(target.value, str) else None
