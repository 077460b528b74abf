"""Commands that README.md and the guides show, and whether each would be understood.

- A block that begins with ```bash holds commands; one that begins with ```text, ```yaml or ```python holds none.
- A text between backticks is a command if it begins with one of PROGRAMS, or is a script of launch/. `...` and [] in it
  are left out.
- Programs that are not of this repository are listed (FOREIGN). What is neither listed nor checked is a problem.
"""

from __future__ import annotations

import configparser
import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dpgen.cli import COMMANDS, build_parser
from helpers.jobs import REPO

PAGES = ("README.md", "conf/README.md", "launch/README.md", "dpgen/README.md", "benchmarks/README.md")
PROGRAMS = ("dpgen", "torchrun", "srun", "sbatch", "python", "bash", "pip", "hf", "git", "ulimit", "source")
FOREIGN = {
    *("hf auth login", "hf download", "git lfs pull", "git lfs install", "ulimit -Hn", "source .venv/bin/activate"),
    "export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps-$USER CUDA_MPS_LOG_DIRECTORY=/tmp/mps-log-$USER",
    "nvidia-cuda-mps-control -d",
    "echo quit | nvidia-cuda-mps-control",
}
TAGS = {"bash", "text", "yaml", "python"}


@dataclass(frozen=True)
class ShownCommand:
    """One command of a page: its words, and whether it stands in a block, to be copied."""

    page: str
    words: tuple[str, ...]
    in_block: bool

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def list_commands(page: str) -> list[ShownCommand]:
    """Return the commands of a page, those of its blocks first.

    Raises:
        ValueError: a block has no known tag, or one that holds no commands begins with a program.
    """
    text = (REPO / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(.*)\n([\s\S]*?)^```$", text, re.MULTILINE)
    commands = []
    for tag, block in blocks:
        if tag not in TAGS or (
            tag != "bash" and re.search(r"^(dpgen|torchrun|python|bash) [\w-]", block, re.MULTILINE)
        ):
            raise ValueError(f"{page}: a block of commands begins with ```bash, others with one of {TAGS}:\n{block}")
        if tag == "bash":
            commands += [ShownCommand(page, tuple(words), True) for words in _split_block(block)]
    rest = re.sub(r"^```[\s\S]*?^```$", "", text, flags=re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", rest):
        words = span.replace("\n", " ").split()
        if (len(words) > 1 and words[0] in PROGRAMS) or (span.startswith("launch/") and span.endswith(".sh")):
            commands += [ShownCommand(page, tuple(words), False) for words in _split(span)]
    return commands


def _split_block(block: str) -> Iterator[list[str]]:
    """Yield the words of each command: one a line, but for quotes and backslashes."""
    pending = ""
    for line in block.splitlines():
        pending += line
        with contextlib.suppress(ValueError):  # a quote is open
            if not line.endswith("\\"):
                yield from _split(pending)
                pending = ""
                continue
        pending += "\n"
    if pending:
        raise ValueError(f"a quote is open: {pending}")


def _split(text: str) -> list[list[str]]:
    text = text.replace("[--", "--").replace("]", "") if "[--" in text else text
    words = [word for word in shlex.split(text, comments=True) if word != "..."]
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def get_dpgen_arguments(words: Sequence[str]) -> list[str] | None:
    """Return what `dpgen` gets from a command that starts it, whatever the launcher; None for other commands."""
    words = list(words)
    if words[0] == "dpgen":
        return words[1:]
    for start in (["-m", "dpgen"], ["python", "-m", "dpgen"]):
        for index in range(len(words) - len(start) + 1):
            if words[index : index + len(start)] == start and words[0] in ("torchrun", "srun", "python"):
                return words[index + len(start) :]
    return None


def find_problem(words: Sequence[str]) -> str | None:
    """Return why a command would not be understood, or None if it would be."""
    if " ".join(words) in FOREIGN:
        return None
    problem = _check_launcher(words)
    arguments = get_dpgen_arguments(words)
    if arguments is not None:
        return problem or _check_dpgen(arguments)
    match words:
        case ["torchrun" | "srun", *_]:
            return problem
        case ["python", "-m", module, *_]:
            is_there = (REPO / f"{module.replace('.', '/')}.py").exists()
            return None if is_there else f"there is no module {module}"
        case ["python" | "bash" | "sbatch", *rest]:
            return _check_script(rest)
        case ["pip", "install", requirement]:
            return _check_extra(requirement)
        case [script, *rest] if script.startswith("launch/"):
            return _check_script([script, *rest])
    return "no rule checks this command: see tests/helpers/shown_commands.py"


def _check_launcher(words: Sequence[str]) -> str | None:
    if words[0] != "torchrun":
        return None
    from torch.distributed.run import get_args_parser

    options = list(words[1:])
    script = options if "-m" in options else [*options, "script.py"]
    return _find_parse_error(get_args_parser().parse_known_args, script)


def _check_dpgen(arguments: Sequence[str]) -> str | None:
    if not arguments or arguments[0].isupper():  # `dpgen COMMAND --help`
        return None
    name, *rest = arguments
    if name.startswith("-"):
        return _find_parse_error(build_parser()[0].parse_known_args, arguments)
    if name not in COMMANDS:
        return f"dpgen has no command {name}"
    if not rest:
        return None
    return _find_parse_error(build_parser(name)[1][name].parse_known_intermixed_args, rest)


def _find_parse_error(parse: Callable[[list[str]], tuple[Any, list[str]]], arguments: Sequence[str]) -> str | None:
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            options, unknown = parse(list(arguments))
    except SystemExit as exited:
        return stderr.getvalue().strip() if exited.code else None
    if unknown and not getattr(options, "accepts_unknown", False):
        return f"unknown arguments {unknown}"
    return None


def _check_script(words: Sequence[str]) -> str | None:
    """Check that a script is there, and that its text has each option that it gets."""
    script = next((word for word in words if "/" in word and (REPO / word).is_file()), None)
    if script is None:
        return "it names no script that is there"
    source = (REPO / script).resolve().read_text(encoding="utf-8")
    if script.startswith("benchmarks/"):
        source += (REPO / "benchmarks" / "measure.py").read_text(encoding="utf-8")
    options = [word.partition("=")[0] for word in words[words.index(script) + 1 :] if word.startswith("--")]
    missing = [option for option in options if option not in source]
    return f"{script} has no {missing}" if missing else None


def _check_extra(requirement: str) -> str | None:
    match = re.fullmatch(r"\.(?:\[(\w+)\])?", requirement.strip("'"))  # the index has another `dpgen`
    if match is None:
        return "it installs another package"
    return None if match[1] in {None, *_read_extras()} else f"setup.cfg has no extra {match[1]}"


@cache
def _read_extras() -> frozenset[str]:
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    return frozenset(setup["options.extras_require"])
