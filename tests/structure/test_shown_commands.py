"""Every command that README.md and the guides show is understood; tests/jobs/test_shown_commands.py runs them."""

from __future__ import annotations

import re

import pytest
from helpers.jobs import REPO
from helpers.shown_commands import PAGES, find_problem, list_commands


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_shows_is_understood(page: str) -> None:
    commands = list_commands(page)
    problems = {str(command): find_problem(command.words) for command in commands}
    assert commands or page == "dpgen/README.md"
    assert not {command: problem for command, problem in problems.items() if problem}


def test_no_text_installs_an_extra_of_another_projects_package() -> None:
    shown = [path for folder in ("dpgen", "conf", "launch") for path in (REPO / folder).rglob("*") if path.is_file()]
    files = [*map(REPO.joinpath, PAGES), *(path for path in shown if path.suffix in (".py", ".yaml", ".md", ".sh"))]
    wrong = [str(path) for path in files if re.search(r"\bdpgen\[\w+\]['\")`]", path.read_text(encoding="utf-8"))]
    assert not wrong, "the package index has another dpgen: pip install '.[extra]' in the checkout"


@pytest.mark.parametrize(
    "text",
    [
        "dpgen preview conf.yaml --rose 3",
        "dpgen previev conf.yaml",
        "dpgen --print-completions bash",
        "torchrun --nproc-per-nodes 8 -m dpgen run conf.yaml",
        "torchrun --nproc-per-node 8 -m dpgen verify RUN_DIR --fast",
        "srun -n 64 python -m dpgen statu RUN_DIR",
        "bash launch/demos.sh",
        "python benchmarks/journal.py --no-such-option",
        "pip install '.[gpus]'",
        "pip install 'dpgen[gpu]'",
        "pip install dpgen",
        "docker run dpgen",
    ],
)
def test_a_command_that_would_fail_is_a_problem(text: str) -> None:
    words = [word.strip("'") for word in text.split()]
    assert find_problem(words)
