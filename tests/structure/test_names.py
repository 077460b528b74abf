"""House rules that the source code alone proves: names, sizes, docstrings."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import pytest
from helpers.source_code import list_package_files, read_source

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_MODULES_PER_FOLDER = 14
MAX_ARGUMENTS = 6
MAX_NOUN_FRACTION = 0.05
# A docstring opens with a verb: what the caller gets. These words open a description or a question instead.
NOUN_OPENING = re.compile(r"(The|An?|What|Whether|Which|How|Who|Why)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Sources = Mapping[str, str]


def read_package() -> dict[str, str]:
    return {path: read_source(path) for path in list_package_files()}


def iter_functions(source: str) -> Iterator[tuple[Function, bool]]:
    """Yield each function, and whether its first argument is self or cls."""
    for node in ast.walk(ast.parse(source)):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                decorators = {ast.unparse(decorator) for decorator in child.decorator_list}
                yield child, isinstance(node, ast.ClassDef) and "staticmethod" not in decorators


def find_repeated_class_names(sources: Sources) -> list[str]:
    places = defaultdict(list)
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    return [f"{name}: {', '.join(lines)}" for name, lines in places.items() if len(lines) > 1]


def find_long_functions(sources: Sources) -> list[str]:
    problems = []
    for path, source in sources.items():
        for function, _ in iter_functions(source):
            num_lines = (function.end_lineno or 0) - function.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                problems.append(f"{path}:{function.lineno}: {function.name} has {num_lines} lines")
    return problems


def find_long_files(sources: Sources) -> list[str]:
    sizes = {path: len(source.splitlines()) for path, source in sources.items()}
    return [f"{path} has {num_lines} lines" for path, num_lines in sizes.items() if num_lines > MAX_FILE_LINES]


def find_full_folders(sources: Sources) -> list[str]:
    """Count modules by folder; an `__init__.py` is none, since it holds a docstring only."""
    modules = defaultdict(list)
    for path in map(PurePosixPath, sources):
        if path.name != "__init__.py":
            modules[path.parent].append(path.name)
    return [
        f"{folder}/ has {len(names)} modules"
        for folder, names in modules.items()
        if len(names) > MAX_MODULES_PER_FOLDER
    ]


def find_long_signatures(sources: Sources) -> list[str]:
    problems = []
    for path, source in sources.items():
        for function, is_bound in iter_functions(source):
            named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            starred = [argument for argument in (function.args.vararg, function.args.kwarg) if argument]
            num_arguments = len(named) + len(starred) - is_bound
            if num_arguments > MAX_ARGUMENTS:
                problems.append(f"{path}:{function.lineno}: {function.name} has {num_arguments} arguments")
    return problems


def find_missing_docstrings(sources: Sources) -> list[str]:
    """Look at modules and at their public functions and classes; methods follow a protocol or have a telling name."""
    problems = []
    for path, source in sources.items():
        module = ast.parse(source)
        if ast.get_docstring(module) is None:
            problems.append(f"{path}: the module")
        public = [
            node for node in module.body if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        ]
        problems += [f"{path}:{node.lineno}: {node.name}" for node in public if ast.get_docstring(node) is None]
    return problems


def find_noun_docstrings(sources: Sources) -> tuple[list[str], int]:
    """Return the docstrings that open with a noun or a question, and the number of all docstrings."""
    noun, num_docstrings = [], 0
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, Function | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                num_docstrings += 1
                if NOUN_OPENING.match(text):
                    line = getattr(node, "lineno", 1)
                    noun.append(f"{path}:{line}: {getattr(node, 'name', 'the module')}: {text.splitlines()[0]}")
    return noun, num_docstrings


def find_filled_inits(sources: Sources) -> list[str]:
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, source in sources.items()
        if path.endswith("__init__.py") and path != "dpgen/__init__.py"  # which exports the Python API
        for node in ast.parse(source).body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]


CHECKS = {
    "class names are unique in the package": find_repeated_class_names,
    f"a function has at most {MAX_FUNCTION_LINES} lines": find_long_functions,
    f"a file has at most {MAX_FILE_LINES} lines": find_long_files,
    f"a folder has at most {MAX_MODULES_PER_FOLDER} modules": find_full_folders,
    f"a function has at most {MAX_ARGUMENTS} arguments": find_long_signatures,
    "modules and their public functions and classes have docstrings": find_missing_docstrings,
    "an __init__.py holds a docstring and nothing else": find_filled_inits,
}


@pytest.mark.parametrize("rule", CHECKS)
def test_the_package_keeps_to_the_house_rule(rule: str) -> None:
    problems = CHECKS[rule](read_package())
    assert not problems, f"{rule}:\n" + "\n".join(problems)


def test_docstrings_open_with_a_verb() -> None:
    noun, num_docstrings = find_noun_docstrings(read_package())
    assert num_docstrings, "no docstring was found at all"
    report = f"{len(noun)} of {num_docstrings} docstrings open with a noun or a question:\n" + "\n".join(noun)
    assert len(noun) <= MAX_NOUN_FRACTION * num_docstrings, report


def make_function(num_lines: int = 2, arguments: str = "", indent: str = "") -> str:
    return "\n".join([f"{indent}def f({arguments}):", *[f"{indent}    pass"] * (num_lines - 1)])


def make_method(arguments: str, decorator: str = "") -> str:
    return f"class A:\n{decorator}{make_function(arguments=arguments, indent='    ')}"


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (find_repeated_class_names, {"a.py": "class A: pass\nclass B: pass"}),
        (find_long_functions, {"a.py": make_function(num_lines=60)}),
        (find_long_files, {"a.py": "\n" * 400}),
        (find_full_folders, {f"dpgen/a/{name}.py": "" for name in [*range(14), "__init__"]}),
        (find_long_signatures, {"a.py": make_function(arguments="a, b, c, /, d, *, e, f=1")}),
        (find_long_signatures, {"a.py": make_method("self, a, b, c, d, e, f")}),
        (find_long_signatures, {"a.py": make_method("cls, a, b, c, d, e, f", "    @classmethod\n")}),
        (find_missing_docstrings, {"a.py": '"""M."""\ndef _f(): pass\nclass A:\n    """A."""\n    def f(self): pass'}),
        (find_filled_inits, {"dpgen/a/__init__.py": '"""A."""', "dpgen/a/b.py": "import os"}),
    ],
)
def test_code_that_keeps_to_a_rule_passes_its_check(rule: object, sources: Sources) -> None:
    assert callable(rule) and rule(sources) == []


@pytest.mark.parametrize(
    ("rule", "sources", "problem"),
    [
        (find_repeated_class_names, {"a.py": "class A: pass", "b.py": "\nclass A: pass"}, "A: a.py:1, b.py:2"),
        (find_repeated_class_names, {"a.py": "def f():\n    class A: pass\nclass A: pass"}, "A: a.py:3, a.py:2"),
        (find_long_functions, {"a.py": make_function(num_lines=61)}, "a.py:1: f has 61 lines"),
        (find_long_files, {"a.py": "\n" * 401}, "a.py has 401 lines"),
        (find_full_folders, {f"dpgen/a/{name}.py": "" for name in range(15)}, "dpgen/a/ has 15 modules"),
        (find_long_signatures, {"a.py": make_function(arguments="a, b, c, /, d, *, e, f=1, g")}, "a.py:1: f has 7"),
        (find_long_signatures, {"a.py": make_function(arguments="a, b, c, d, e, *f, **g")}, "a.py:1: f has 7"),
        (find_long_signatures, {"a.py": make_method("self, a, b, c, d, e, f, g")}, "a.py:2: f has 7"),
        (find_long_signatures, {"a.py": make_method("a, b, c, d, e, f, g", "    @staticmethod\n")}, "a.py:3: f has 7"),
        (find_missing_docstrings, {"a.py": "import os"}, "a.py: the module"),
        (find_missing_docstrings, {"a.py": '"""M."""\ndef f(): pass'}, "a.py:2: f"),
        (find_missing_docstrings, {"a.py": '"""M."""\nclass A: pass'}, "a.py:2: A"),
        (find_filled_inits, {"dpgen/a/__init__.py": '"""A."""\nfrom a import b'}, "dpgen/a/__init__.py:2: from a"),
    ],
)
def test_code_that_breaks_a_rule_is_reported_with_file_and_line(rule: object, sources: Sources, problem: str) -> None:
    assert callable(rule)
    [message] = rule(sources)
    assert message.startswith(problem)


@pytest.mark.parametrize("text", ["The rows.", "A row.", "An engine.", "What is left.", "Whether rows are left.", "A"])
def test_a_docstring_that_opens_with_a_noun_is_counted(text: str) -> None:
    [noun], num_docstrings = find_noun_docstrings({"a.py": f'"""Read."""\ndef _f():\n    """{text}"""'})
    assert noun == f"a.py:2: _f: {text}" and num_docstrings == 2


@pytest.mark.parametrize("text", ["Return the rows.", "Theorize.", "Answer a peer.", "Whatever.", "``The`` format."])
def test_a_docstring_that_opens_with_a_verb_is_not_counted(text: str) -> None:
    assert find_noun_docstrings({"a.py": f'"""{text}"""\ndef f(): pass'}) == ([], 1)
