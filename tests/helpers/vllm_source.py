"""Read in vLLM's source, without importing it, whether it has what dpgen uses, and takes dpgen's calls."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

_DATA_BASES = (
    "BaseModel",
    "Struct",
    "NamedTuple",
    "TypedDict",
)  # a class of these, or a dataclass, is made of its fields


class Found(NamedTuple):
    """Hold a definition, and the module that it stands in."""

    node: Any
    module: str


class VllmSource:
    """Read one version.

    Args:
        path: a wheel, for a GPU or not, or a folder that holds `vllm`.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            self._names = {file.relative_to(path).as_posix() for file in (path / "vllm").rglob("*.py")}
            self._read = lambda name: (path / name).read_text(encoding="utf-8")
        else:
            wheel = zipfile.ZipFile(path)
            self._names = {name for name in wheel.namelist() if name.startswith("vllm/")}
            self._read = lambda name: wheel.read(name).decode()
        self.parse, self.find = cache(self._parse), cache(self._find)

    def describe(self, target: str, call: str | None = None) -> str:
        """Return what a target is: "value", "method" or "class"; "-" if there is none; for a call "taken" or "refused".

        Args:
            target: "module:Class.attribute".
            call: as in `helpers.vllm_uses.Use`.
        """
        module, _, path = target.partition(":")
        found, owner = None, None
        for name in path.split("."):
            owner, found = found, self.find(module, name) if found is None else self._find_member(found, name)
            if found is None:
                return "-"
        assert found is not None
        if call is None:
            return _describe_kind(found.node)
        if isinstance(found.node, ast.ClassDef):
            return "taken" if accepts(self._read_constructor(found), call) else "refused"
        if _describe_kind(found.node) != "method":
            return "refused"
        return "taken" if accepts(_read_parameters(found.node, is_member=owner is not None), call) else "refused"

    def list_fields(self, target: str) -> list[str]:
        """Return the names of a class's own fields with annotations."""
        found = self.find(*target.split(":"))
        assert found is not None, target
        return sorted(field.target.id for field in _iter_fields(found.node))

    def has_text(self, file: str, text: str) -> bool:
        """Return True if a text stands in a file of this name, also where it continues in a further string literal."""
        paths = (name for name in self._names if PurePosixPath(name).name == file)
        return any(text in re.sub(r'"\s*f?"', "", self._read(path)) for path in paths)

    def _parse(self, module: str) -> ast.Module | None:
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in self._names:
                return ast.parse(self._read(name))
        return None

    def _find(self, module: str, name: str) -> Found | None:
        """Return what a module calls by a name: of its own, imported (also lazily), or a submodule."""
        tree = self.parse(module)
        if tree is None:
            return None
        last: Found | None = None
        for node in _iter_statements(tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                last = Found(node, module)
            elif isinstance(node, ast.ImportFrom):
                asked = [alias.name for alias in node.names if (alias.asname or alias.name) == name]
                source = self._make_absolute(module, node)
                if asked and source.split(".")[0] == "vllm":
                    last = self.find(source, asked[0]) or last
            elif _find_target(node) == name and last is None:
                assert isinstance(node, ast.Assign | ast.AnnAssign)
                last = self._find_instance(node, module)
        return last or (Found(tree, module) if self.parse(f"{module}.{name}") is not None else None)

    def _find_instance(self, node: ast.Assign | ast.AnnAssign, module: str) -> Found:
        """Return the class of a module's variable where that shows, else the assignment."""
        made = node.value.func if isinstance(node.value, ast.Call) else getattr(node, "annotation", None)
        found = self.find(module, made.id) if isinstance(made, ast.Name) else None
        return found or Found(node, module)

    def _make_absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = f"{module.replace('.', '/')}/__init__.py" in self._names
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _iter_classes(self, found: Found) -> Iterator[Found]:
        """Yield a class and its bases, as far as they are vLLM's."""
        yield found
        for base in getattr(found.node, "bases", ()):
            name = base.value if isinstance(base, ast.Subscript) else base
            parent = self.find(found.module, name.id) if isinstance(name, ast.Name) else None
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                yield from self._iter_classes(parent)

    def _find_member(self, found: Found, name: str) -> Found | None:
        if not isinstance(found.node, ast.ClassDef):
            return self.find(f"{found.module}.{name}", name)
        for owner in self._iter_classes(found):
            if (member := _list_members(owner.node).get(name)) is not None:
                return Found(member, owner.module)
        return None

    def _read_constructor(self, found: Found) -> list[str]:
        constructor = self._find_member(found, "__init__")
        if constructor is not None:
            return _read_parameters(constructor.node, is_member=True)
        bases = [ast.unparse(base) for owner in self._iter_classes(found) for base in owner.node.bases]
        is_data = any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list)
        if bases and not is_data and not any(base.rpartition(".")[2] in _DATA_BASES for base in bases):
            return ["*any", "**"]
        parameters: dict[str, str] = {}
        for owner in reversed(list(self._iter_classes(found))):
            for node in _iter_fields(owner.node):
                parameters[node.target.id] = node.target.id if node.value is None else f"{node.target.id}="
        return list(parameters.values())


def accepts(parameters: list[str], call: str) -> bool:
    """Return True if a function takes a call.

    Args:
        parameters: those with a default end in "="; those behind "*" or "*args" have no place; "**" takes any keyword.
    """
    num_places, *keywords = call.split()
    is_open = "*" in keywords
    given = set(keywords) - {"*"}
    star = next((index for index, name in enumerate(parameters) if name.startswith("*")), len(parameters))
    names = [name.rstrip("=") for name in parameters]
    placed = set(names[: min(star, int(num_places))])
    has_room = int(num_places) <= star or any(name[0] == "*" and name[1:2].isalpha() for name in names)
    has_keywords = given <= set(names) - placed or ("**" in names and not given & placed)
    needed = {name for name in parameters if name[0] != "*" and name[-1] != "="}
    return has_room and has_keywords and (is_open or needed <= placed | given)


def _iter_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield a module's statements, with those of its branches."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody") if isinstance(node, ast.If | ast.Try) else ():
            yield from _iter_statements(getattr(node, part, []))


@cache
def _list_members(node: ast.ClassDef) -> dict[str | None, ast.AST]:
    """Return what stands in a class by its name, and what its methods assign to `self`."""
    members: dict[str | None, ast.AST] = {}
    for item in _iter_statements(node.body):
        for inner in ast.walk(item) if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) else ():
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _is_self(inner.value):
                members.setdefault(inner.attr, inner)
        members[_find_target(item)] = item
    return members


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _iter_fields(node: ast.ClassDef) -> Iterator[Any]:
    for item in node.body:
        is_named = isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        if is_named and not ast.unparse(item.annotation).startswith("ClassVar"):
            yield item


def _find_target(node: ast.AST) -> str | None:
    """Return the name that a statement defines."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else None


def _describe_kind(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return "value"
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    is_property = any("property" in name or name.endswith(".setter") for name in decorators)
    return "value" if is_property else "method"


def _read_parameters(node: Any, *, is_member: bool) -> list[str]:
    """Return a function's parameters as `accepts` takes them, without `self`."""
    given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    num_needed = len(given) - len(node.args.defaults)
    parameters = [f"{name}=" if place >= num_needed else name for place, name in enumerate(given)]
    if is_member and not any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list):
        parameters = parameters[1:]
    if node.args.vararg or node.args.kwonlyargs:
        parameters.append(f"*{node.args.vararg.arg if node.args.vararg else ''}")
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        parameters.append(argument.arg if default is None else f"{argument.arg}=")
    return [*parameters, *(["**"] if node.args.kwarg else [])]
