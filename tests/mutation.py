"""Measure the tests: change dpgen's code at random places, one at a time, and see whether a test fails.

    pip install '.[mutation]'
    python tests/mutation.py --mutants 120 --workers 16          # prints the survivors, and one JSON line

A mutant is first tried on the tests of its wing, and if it survives on all tests that need no engine, SLURM or network
namespace. Mutants come from cosmic-ray; those that change nothing at run time (annotations, docstrings) are left out.
Each worker has a copy of the repository, so that the work tree stays as it is.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Queue

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

REPO = Path(__file__).resolve().parents[1]
MODULES = [
    "dpgen/journal/*.py",
    "dpgen/scheduling/claims.py",
    "dpgen/scheduling/order.py",
    "dpgen/engine/supervisor.py",
    "dpgen/engine/blame.py",
    "dpgen/output/gather.py",
    "dpgen/output/verification.py",
    "dpgen/output/dataset_check.py",
    "dpgen/distributed/stages.py",
]
QUICK = "not vllm and not slow and not slurm and not netns and not multi"
ALL = "not vllm and not slurm and not netns"
_WITH_ARGUMENTS = ("VariableReplacer", "VariableInserter")  # operators that need to be told a variable


@dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        path: of the module, below the repository.
        line: of the change.
        source: the whole changed module.
        change: the line before and after.
    """

    path: str
    line: int
    operator: str
    source: str
    change: str


def choose_mutants(paths: list[Path], number: int, seed: int) -> list[Mutant]:
    """Return mutants that may behave differently, at most one a line: an operator has many mutants of one kind."""
    places = [place for path in paths for place in _list_places(path)]
    chooser = random.Random(seed)
    chooser.shuffle(places)
    by_line = {(path, line): (path, name, occurrence) for path, line, name, occurrence in places}
    candidates = list(by_line.values())
    chooser.shuffle(candidates)
    mutants = (_make_mutant(*candidate) for candidate in candidates)
    return list(islice((mutant for mutant in mutants if mutant is not None), number))


def _list_places(path: Path) -> Iterator[tuple[Path, int, str, int]]:
    """Yield the path, line, operator and occurrence of each possible mutant of a module."""
    tree = get_ast(path.read_text())
    for name in operator_names():
        if name.endswith(_WITH_ARGUMENTS):
            continue
        operator = get_operator(name)()
        positions = [position for node in _walk(tree) for position in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(positions):
            yield path, start[0], name, occurrence


def _make_mutant(path: Path, name: str, occurrence: int) -> Mutant | None:
    source = path.read_text()
    mutated = mutate_code(source, get_operator(name)(), occurrence)
    if mutated is None or _strip(mutated) == _strip(source):
        return None
    before, after = source.splitlines(), mutated.splitlines()
    line = next(i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1])
    change = f"{before[line].strip()}  →  {after[line].strip()}"
    return Mutant(str(path.relative_to(REPO)), line + 1, name.rpartition("/")[2], mutated, change)


def _walk(node: object) -> Iterator[object]:
    yield node
    for child in getattr(node, "children", ()):
        yield from _walk(child)


def _strip(source: str) -> str | None:
    """Return the program without annotations and docstrings; None if it is none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.dump(tree)


class Worker:
    """A copy of the repository, in which one mutant at a time is tested."""

    def __init__(self, folder: Path, pytest_arguments: list[str]) -> None:
        self.folder, self._pytest_arguments = folder, pytest_arguments
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*cache", ".gpu", ".whl", "runs")
        shutil.copytree(REPO, folder, ignore=ignored)

    def find_killer(self, mutant: Mutant, *, is_thorough: bool, limit_s: float) -> str | None:
        """Return what killed the mutant: "wing", "all", or "time"; None for a survivor."""
        path = self.folder / mutant.path
        original = path.read_text()
        path.write_text(mutant.source)
        try:
            wing = Path(mutant.path).parts[1]
            stages = [("wing", [f"tests/{wing}"], QUICK), ("all", ["tests"], QUICK), ("all", ["tests"], ALL)]
            for name, tests, marks in stages if is_thorough else stages[:1]:
                status = self.run(tests, marks, limit_s)
                if status != 0:
                    return "time" if status is None else name
            return None
        finally:
            path.write_text(original)

    def run(self, tests: list[str], marks: str, limit_s: float) -> int | None:
        """Return pytest's exit status; None if it took too long."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", marks, *tests]
        command += ["--ignore", "tests/structure", *self._pytest_arguments]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["OMP_NUM_THREADS"] = "1"
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                return process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=120)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=MODULES)
    parser.add_argument("--quick", action="store_true", help="only the tests of the mutant's wing")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first ones, which were tried before")
    parser.add_argument("--limit-s", type=float, default=900.0, help="of one run of the tests")
    parser.add_argument("--total-s", type=float, default=float("inf"), help="begin no mutant after so many seconds")
    parser.add_argument("--pytest-arguments", default="", help="of every run, e.g. '--deselect TEST'")
    options = parser.parse_args()
    paths = sorted(path for pattern in options.modules for path in REPO.glob(pattern))
    chosen = choose_mutants(paths, options.mutants, options.seed)[options.skip :]
    print(f"{len(chosen)} mutants of {len(paths)} modules", file=sys.stderr)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dpgen-mutation-") as folder:
        workers: Queue[Worker] = Queue()
        for number in range(options.workers):
            workers.put(Worker(Path(folder) / str(number), options.pytest_arguments.split()))
        wings = sorted({Path(mutant.path).parts[1] for mutant in chosen})
        with ThreadPoolExecutor(options.workers) as pool:
            sound = list(
                pool.map(
                    lambda pair: pair[0].run([f"tests/{pair[1]}"], QUICK, options.limit_s) == 0,
                    zip(list(workers.queue), wings, strict=False),
                )
            )
        if not all(sound):
            print(f"tests fail without a mutant: {', '.join(wings)}: {sound}", file=sys.stderr)
            return 1

        def test(mutant: Mutant) -> str | None:
            if time.monotonic() - started_s > options.total_s:
                return "untried"
            worker = workers.get()
            try:
                killer = worker.find_killer(mutant, is_thorough=not options.quick, limit_s=options.limit_s)
            finally:
                workers.put(worker)
            if killer is None:
                print(f"survived: {mutant.path}:{mutant.line} {mutant.operator}: {mutant.change}", flush=True)
            return killer

        with ThreadPoolExecutor(options.workers) as pool:
            killers = list(pool.map(test, chosen))
    tried = [killer for killer in killers if killer != "untried"]
    facts = {
        "mutants": len(tried),
        "killed": sum(killer is not None for killer in tried),
        "by": {name: tried.count(name) for name in ("wing", "all", "time")},
        "survivors": [
            f"{mutant.path}:{mutant.line}: {mutant.change}"
            for mutant, killer in zip(chosen, killers, strict=True)
            if killer is None
        ],
        "untried": killers.count("untried"),
        "seed": options.seed,
        "seconds": round(time.monotonic() - started_s),
    }
    print(f"{facts['killed']} of {facts['mutants']} mutants were killed")
    print(json.dumps(facts, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
