"""The order of the package's wings: an import goes down or stays on its floor, never up.

- Imports in functions and in TYPE_CHECKING blocks count: both tie a wing to what lies above it.
- A cycle between wings needs an import that runs up, so none can arise.
"""

from __future__ import annotations

import pytest
from helpers.source_code import PACKAGE, find_imports, list_package_files, read_source

# From the top down. Modules and wings in one row share a floor.
ORDER = (
    ("__init__",),  # exports the Python API, and imports it when a name is used
    ("__main__",),
    ("cli",),
    ("commands", "api"),
    ("rank_process",),
    ("run",),
    ("run_parts",),
    ("report",),
    ("tuning",),
    ("simulation",),
    ("monitoring",),
    ("scheduling",),
    ("engine",),
    ("output",),
    ("distributed",),
    ("journal",),
    ("data",),
    ("config",),
    ("workers",),
    ("programs",),
    ("lifecycle",),
    ("records", "result_codec", "logprobs", "errors", "formatting", "log", "imports"),
)
FLOORS = {name: len(ORDER) - depth for depth, names in enumerate(ORDER) for name in names}

# SLURM jobs that are queued already call `python -m dpgen.ports` and `python -m dpgen.requeue`. Each of the two files
# may import the one module that it forwards to, and nothing imports the file itself.
FORWARDERS = {"dpgen/ports.py": "dpgen.distributed.ports", "dpgen/requeue.py": "dpgen.lifecycle.requeue"}


def get_place(path: str) -> str:
    """Return the wing of a file, or the name of a module that is in none."""
    return path.split("/")[1].removesuffix(".py")


def find_imports_that_run_up(source: str, path: str) -> list[str]:
    """Return one message for each import of dpgen that the order forbids, with file and line."""
    own = get_place(path)
    problems = []
    for imported in find_imports(source, path):
        package, _, rest = imported.target.partition(".")
        if package != PACKAGE:
            continue
        where = f"{path}:{imported.line}: {imported.text}"
        wing = rest.partition(".")[0]
        if f"{PACKAGE}/{wing}.py" in FORWARDERS:
            problems.append(f"{where}: only queued SLURM jobs call the forwarder {wing}")
        elif path in FORWARDERS:
            if not imported.target.startswith(FORWARDERS[path]):
                problems.append(f"{where}: this forwarder imports {FORWARDERS[path]} alone")
        # A name that is no wing is one of dpgen/__init__.py itself, which loads nothing when it is imported.
        elif FLOORS.get(wing, 1) > FLOORS[own]:
            problems.append(f"{where}: {own} lies below {wing}")
    return problems


def test_no_import_runs_up() -> None:
    problems = [
        problem for path in list_package_files() for problem in find_imports_that_run_up(read_source(path), path)
    ]
    assert not problems, "imports run down only:\n" + "\n".join(problems)


def test_every_module_has_a_place_in_the_order() -> None:
    places = {get_place(path) for path in list_package_files() if path not in FORWARDERS}
    assert places == set(FLOORS), "a new wing or top-level module belongs into ORDER, a removed one out of it"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dpgen/config/schema.py", "import os\nfrom dpgen.config.prompt import PromptConfig\nimport dpgen.errors"),
        ("dpgen/run.py", "from dpgen.engine.supervisor import EngineSupervisor"),
        ("dpgen/records.py", "from dpgen.errors import RowRefused"),
        ("dpgen/records.py", "import dpgen"),
        ("dpgen/engine/process.py", "from . import messages\nfrom ..errors import DpgenError"),
        ("dpgen/engine/process.py", "def f():\n    import vllm.engine\n    from run import cli"),
        ("dpgen/ports.py", "from dpgen.distributed.ports import main"),
        ("dpgen/cli.py", "from dpgen import run"),
    ],
)
def test_an_import_that_runs_down_or_stays_on_its_floor_passes(path: str, source: str) -> None:
    assert find_imports_that_run_up(source, path) == []


@pytest.mark.parametrize(
    ("path", "source", "line"),
    [
        ("dpgen/records.py", "import os\nfrom dpgen.config.schema import Config", 2),
        ("dpgen/records.py", "import dpgen.run", 1),
        ("dpgen/records.py", "import dpgen.lifecycle as l", 1),
        ("dpgen/config/schema.py", "from dpgen import data", 1),
        ("dpgen/config/schema.py", "from dpgen import errors, run", 1),
        (
            "dpgen/config/schema.py",
            "def f():\n    def g():\n        from dpgen.data.tokenizer import load_tokenizer",
            3,
        ),
        (
            "dpgen/engine/supervisor.py",
            "if TYPE_CHECKING:\n    from dpgen.scheduling.claims import ShardClaimer",
            2,
        ),
        ("dpgen/engine/supervisor.py", "from ..scheduling import claims", 1),
        ("dpgen/engine/supervisor.py", "from .. import run", 1),
        ("dpgen/journal/__init__.py", "from ..output.gather import gather_segments", 1),
        ("dpgen/engine/supervisor.py", 'import importlib\nimportlib.import_module("dpgen.run")', 2),
        ("dpgen/engine/supervisor.py", '__import__("dpgen.cli")', 1),
        ("dpgen/engine/supervisor.py", 'name = "verify"\nimport_module(f"dpgen.commands.{name}")', 2),
        ("dpgen/commands/slurm.py", "from dpgen.cli import main", 1),
        ("dpgen/cli.py", "from dpgen.__main__ import main", 1),
        ("dpgen/run.py", "from dpgen.api.session import generate", 1),
        ("dpgen/run.py", "from dpgen import api", 1),
        ("dpgen/cli.py", "from dpgen.ports import main", 1),
        ("dpgen/requeue.py", "from dpgen.run import run", 1),
    ],
)
def test_an_import_that_runs_up_is_reported_with_file_and_line(path: str, source: str, line: int) -> None:
    [problem] = find_imports_that_run_up(source, path)
    assert problem.startswith(f"{path}:{line}: "), problem
