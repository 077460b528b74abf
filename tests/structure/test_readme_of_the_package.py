"""The page dpgen/README.md: every file, class and function that it names exists.

The convention of the page, inside one pair of backticks, with paths relative to dpgen/:

- `scheduling/claims.py` names a file; `../tests/chaos.py` lies outside of the package.
- `scheduling/claims.py: ShardClaimer.claim` names a function, class, method, field or constant of a file. After the
  colon stands one name, dotted below classes, without parentheses.
- In a block between ``` lines each word that ends in ".py" names a file. Other backticks name nothing of the package.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers.jobs import REPO

PAGE = REPO / "dpgen" / "README.md"

_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_PLACE = re.compile(r"(?P<path>[\w./-]+\.py)(?::(?P<name>.*))?$")
_FILE = re.compile(r"[\w./-]+\.py\b")


def list_places(page: str) -> list[tuple[str, str]]:
    """Return (path, name) for each place that a page names; the name is empty where it names the file alone."""
    matches = (_PLACE.match(span) for span in _SPAN.findall(_BLOCK.sub("", page)))
    places = [(match["path"], (match["name"] or "").strip()) for match in matches if match]
    return places + [(path, "") for block in _BLOCK.findall(page) for path in _FILE.findall(block)]


def list_names(source: str) -> set[str]:
    """Return the names that a file defines: `name`, and `Class.name` for names in a class or set on its self."""
    names: set[str] = set()
    _collect_names(ast.parse(source), "", names)
    return names


def _collect_names(scope: ast.AST, prefix: str, names: set[str]) -> None:
    for node in ast.iter_child_nodes(scope):
        match node:
            case ast.ClassDef():
                names.add(prefix + node.name)
                _collect_names(node, f"{prefix}{node.name}.", names)
                names |= {f"{prefix}{node.name}.{name}" for name in _list_self_attributes(node)}
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                names.add(prefix + node.name)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
            case ast.If() | ast.Try():
                _collect_names(node, prefix, names)


def _list_self_attributes(node: ast.ClassDef) -> set[str]:
    return {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def find_missing_places(page: str, package: Path) -> list[str]:
    """Return one message for each place that does not exist below `package`."""
    problems = []
    for path, name in list_places(page):
        file = package / path
        if not file.is_file():
            problems.append(f"`{path}`: there is no such file")
        elif name and name not in list_names(file.read_text(encoding="utf-8")):
            problems.append(f"`{path}: {name}`: the file defines no {name}")
    return problems


def test_every_place_that_the_page_names_exists() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert any(name for _, name in list_places(page)), "the page names code as `path.py: name`"
    problems = find_missing_places(page, PAGE.parent)
    assert not problems, "dpgen/README.md:\n" + "\n".join(problems)


def test_the_page_lists_every_wing() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = {path.parent.name for path in PAGE.parent.glob("*/__init__.py")} - set(re.findall(r"(\w+)/", page))
    assert not missing, "dpgen/README.md leaves out a wing"


SOURCE = """
import os
from somewhere import imported
LIMIT = 3
def run(): pass
if LIMIT:
    def chosen(): pass
class Claimer:
    size: int
    KIND = "a"
    def __init__(self):
        self.num_rows = 1
        local = 2
    def claim(self): pass
    class Inner:
        def look(self): pass
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "wing").mkdir()
    (tmp_path / "wing" / "claims.py").write_text(SOURCE)
    (tmp_path / "run.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        "| claiming | `wing/claims.py: Claimer.claim` | see `run.py` |",
        "`wing/claims.py: run`, then `wing/claims.py: chosen` and `wing/claims.py: LIMIT`.",
        "`wing/claims.py: Claimer`, `wing/claims.py: Claimer.size`, `wing/claims.py: Claimer.KIND`",
        "`wing/claims.py: Claimer.num_rows` and `wing/claims.py:Claimer.Inner.look`",
        "[code](wing/claims.py) fills `dataset/`, and `python -m dpgen run` starts it: `key: value`, `a.yaml`",
        "```\nrun.py, wing/   a row → `nothing`\n```\n`run.py`",
    ],
)
def test_a_page_whose_places_exist_passes(package: Path, page: str) -> None:
    assert find_missing_places(page, package) == []


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("`wing/claim.py`", "`wing/claim.py`: there is no such file"),
        ("`wing/claim.py: Claimer`", "`wing/claim.py`: there is no such file"),
        ("`claims.py`", "`claims.py`: there is no such file"),
        ("see `wing/claims.py: Claimant`.", "`wing/claims.py: Claimant`: the file defines no Claimant"),
        ("`wing/claims.py: Claimer.take`", "`wing/claims.py: Claimer.take`: the file defines no Claimer.take"),
        ("`wing/claims.py: claim`", "`wing/claims.py: claim`: the file defines no claim"),
        ("`wing/claims.py: Claimer.local`", "`wing/claims.py: Claimer.local`: the file defines no Claimer.local"),
        ("`wing/claims.py: imported`", "`wing/claims.py: imported`: the file defines no imported"),
        ("`wing/claims.py: run()`", "`wing/claims.py: run()`: the file defines no run()"),
        ("`wing/claims.py: run, chosen`", "`wing/claims.py: run, chosen`: the file defines no run, chosen"),
        ("```\ncode\n```\n`nothing.py`", "`nothing.py`: there is no such file"),
        ("```\nrun.py  wing/nothing.py\n```\n`run.py`", "`wing/nothing.py`: there is no such file"),
    ],
)
def test_a_place_that_does_not_exist_is_reported(package: Path, page: str, problem: str) -> None:
    assert find_missing_places(page, package) == [problem]
