"""Find what dpgen uses of vLLM, in dpgen's own source: imports, calls, and attributes of vLLM's objects.

- An object of vLLM is known by its annotation, by what was assigned to the name, or by the name itself
  (`helpers.vllm_classes`).
- A use is guarded where its function asks `hasattr` for the name, where `getattr` has a default, and an import in a
  `try` for ImportError.

Limits: keywords behind `**` are not seen, nor calls of a method that was put into a variable.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.vllm_classes import CLASSES, UNSEEN, VARIABLES

# Of pydantic, msgspec and transformers, not of vLLM.
FOREIGN = {"model_fields", "model_validate", "__struct_fields__", "chat_template"}
REPO = Path(__file__).resolve().parents[2]
HOME = REPO / "dpgen" / "engine" / "vllm"


@dataclass(frozen=True)
class Use:
    """Say what dpgen uses.

    Attributes:
        target: "module:Class.attribute".
        call: how it is called, as "2 name other": the number of places, then keywords; with "*" at the end where
            there may be more; None where it is not called.
        is_guarded: True if dpgen does without, too.
        where: the file and the line.
    """

    target: str
    call: str | None = None
    is_guarded: bool = False
    where: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """Return what the record calls it."""
        return self.target if self.call is None else f"{self.target}({self.call})"


def find_uses() -> tuple[list[Use], list[str]]:
    """Return what dpgen uses of vLLM, and attributes of parameters that are `Any` and may be anything."""
    uses, unknown = [Use(*key.rstrip(")").split("(")) for key in UNSEEN], list[str]()
    for path in sorted((REPO / "dpgen").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.is_relative_to(HOME) or re.search(r"^\s*from vllm\b", text, re.MULTILINE):
            found = read_uses(text, str(path.relative_to(REPO)))
            uses, unknown = uses + found[0], unknown + found[1]
    return uses, unknown


def read_uses(source: str, path: str) -> tuple[list[Use], list[str]]:
    """Return the same of one module."""
    finder = _Finder(path)
    finder.visit(ast.parse(source))
    return finder.uses, finder.unknown


class _Finder(ast.NodeVisitor):
    """Collect the uses of one module."""

    def __init__(self, path: str) -> None:
        names = next((names for end, names in VARIABLES.items() if path.endswith(end)), {})
        self.uses: list[Use] = []
        self._path, self._names = path, {**CLASSES, **names}
        self._scopes: list[dict[str, str | None]] = [{}]  # of the module, and of each function around
        self._attributes: dict[str, str | None] = {}  # of self
        self._outer: list[str] = []  # names of the classes and functions around
        self._guarded: list[set[str]] = [set()]
        self._is_in_try = False
        self._any: list[set[str]] = []  # parameters of the functions around that may be anything
        self._own: set[str] = set()  # names that dpgen's subclasses of vLLM's classes add
        self.unknown: list[str] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._attributes = {}
        bases = [base for base in map(self._resolve, node.bases) if base is not None]
        if bases:
            self._scopes[-1][node.name] = bases[0]
            names = (item.target if isinstance(item, ast.AnnAssign) else item for item in node.body)
            self._own |= {getattr(name, "name", getattr(name, "id", "")) for name in names}
        self._outer.append(node.name)
        self.generic_visit(node)
        self._outer.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._outer.append(node.name)
        scope: dict[str, str | None] = {}
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if argument.annotation is not None and ast.unparse(argument.annotation) != "Any":
                scope[argument.arg] = self._read_annotation(argument.annotation)
        self._scopes.append(scope)
        self._any.append({argument.arg for argument in node.args.args} - scope.keys() - {"self", "cls"})
        asked = {call.args[1].value for call in _iter_calls(node, "hasattr") if isinstance(call.args[1], ast.Constant)}
        self._guarded.append(self._guarded[-1] | {str(name) for name in asked})
        self.generic_visit(node)
        self._guarded.pop()
        self._any.pop()
        self._scopes.pop()
        self._outer.pop()

    def visit_Try(self, node: ast.Try) -> None:
        before = self._is_in_try
        self._is_in_try = any("ImportError" in ast.unparse(handler.type) for handler in node.handlers if handler.type)
        self.generic_visit(node)
        self._is_in_try = before

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] != "vllm":
            return
        for alias in node.names:
            target = f"{node.module}:{alias.name}"
            self._scopes[-1][alias.asname or alias.name] = target
            self._add(node, target, is_guarded=self._is_in_try)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if (found := self._read_annotation(node.annotation)) is not None:
            self._bind(node.target, found)
        elif node.value is not None:
            self._assign(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._assign(node.target, node.value)

    def visit_Attribute(self, node: ast.Attribute, call: str | None = None) -> None:
        self.visit(node.value)
        owner = self._resolve(node.value)
        if owner:
            self._add(node, f"{owner}.{node.attr}", call, is_guarded=node.attr in self._guarded[-1])
        elif isinstance(node.value, ast.Name) and node.value.id not in self._names and not hasattr(dict, node.attr):
            is_any = any(node.value.id in names for names in self._any)
            self.unknown += [f"{self._path}:{node.lineno} {ast.unparse(node)}"] if is_any else []

    def visit_Call(self, node: ast.Call) -> None:
        call = _describe_call(node)
        own = self._resolve(node.func)
        if own is not None:
            self._add(node, own, call)
            self.visit(node.func)
        elif isinstance(node.func, ast.Attribute):
            self.visit_Attribute(node.func, call)
        elif isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner, name = self._resolve(node.args[0]), node.args[1]
            if owner is not None and isinstance(name, ast.Constant):
                is_guarded = node.func.id == "hasattr" or len(node.args) == 3 or name.value in self._guarded[-1]
                self._add(node, f"{owner}.{name.value}", is_guarded=is_guarded)
        else:
            self.visit(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)

    def _add(self, node: Any, target: str, call: str | None = None, *, is_guarded: bool = False) -> None:
        if target.rpartition(".")[2] not in FOREIGN | self._own:
            self.uses.append(Use(target, call, is_guarded, f"{self._path}:{node.lineno}"))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, given in zip(target.elts, value.elts, strict=True):
                self._assign(part, given)
        elif (found := self._resolve(value)) is not None:
            self._bind(target, found)

    def _bind(self, target: ast.expr, found: str) -> None:
        if isinstance(target, ast.Name):
            self._scopes[-1][target.id] = found
        elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            self._attributes[target.attr] = found

    def _read_annotation(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.BinOp):
            return self._read_annotation(node.left) or self._read_annotation(node.right)
        if isinstance(node, ast.Subscript):
            return self._read_annotation(node.value)
        return self._look_up(node.id) if isinstance(node, ast.Name) and node.id[:1].isupper() else None

    def _resolve(self, node: ast.expr) -> str | None:
        """Return the class of vLLM that an expression is, or is an instance of; None where it is neither."""
        match node:
            case ast.Name(id):
                return self._look_up(id)
            case ast.Attribute(ast.Name("self"), name):
                return self._attributes.get(name) or self._names.get(name)
            case ast.Attribute(value, name):
                owner = (self._resolve(value) or "").rpartition(":")[2]
                return self._names.get(f"{owner}.{name}") or self._names.get(name)
            case ast.Call(ast.Name("super")):
                return self._names.get(f"{self._outer[0]}.super()")
            case ast.Call(func):
                if (own := self._resolve(func)) is not None:
                    return own
                return self._names.get(f"{ast.unparse(func).rpartition('.')[2]}()")
            case ast.IfExp(_, body, other):
                return self._resolve(body) or self._resolve(other)
            case ast.BoolOp(_, values):
                return next((found for value in values if (found := self._resolve(value))), None)
            case ast.NamedExpr(_, value):
                return self._resolve(value)
        return None

    def _look_up(self, name: str) -> str | None:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        qualified = (self._names.get(f"{outer}.{name}") for outer in self._outer)
        return next(filter(None, qualified), None) or self._names.get(name)


def _iter_calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == name:
            yield inner


def _describe_call(node: ast.Call) -> str:
    places = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    names = sorted(keyword.arg for keyword in node.keywords if keyword.arg is not None)
    is_open = len(places) < len(node.args) or len(names) < len(node.keywords)
    return " ".join([str(len(places)), *names, *(["*"] if is_open else [])])
