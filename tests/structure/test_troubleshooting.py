"""The troubleshooting tables of launch/README.md: each message exists, and no exception is left out.

In the first column a message stands between backticks, and `...` in it is what varies. Below "vLLM's and CUDA's own
words" messages are those of vLLM and torch.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from helpers.jobs import REPO

PAGE = REPO / "launch" / "README.md"
HEADING = "## Troubleshooting by error message"
FOREIGN = "vLLM's and CUDA's own words"
# The machine's and CUDA's words, which no Python file holds.
NOT_OF_VLLM = {"CUDA out of memory", "Address already in use"}
_HOLE = "\0"


def read_rows() -> tuple[list[list[str]], list[list[str]]]:
    """Return the cells of the rows about dpgen's messages, and of those about vLLM's."""
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2]
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    before, _, rest = section.partition(FOREIGN)
    foreign, _, after = rest.partition("\n### ")
    return _read_table(before + after), _read_table(foreign)


def _read_table(text: str) -> list[list[str]]:
    rows = re.findall(r"^\| (`.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


def list_texts(source: str) -> set[str]:
    """Return the string literals of a file; a hole stands where an f-string has a value."""
    texts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else _HOLE for part in node.values]
            texts.add("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return texts


def make_pattern(message: str) -> re.Pattern[str]:
    """Return a pattern that finds a message in a literal: what varies is at least one value of an f-string."""
    parts = [re.escape(part.strip()) for part in message.strip("`").split("...")]
    return re.compile(r"[^\n]*".join(part for part in parts if part))


@pytest.fixture(scope="module")
def texts() -> set[str]:
    return {text for path in (REPO / "dpgen").rglob("*.py") for text in list_texts(path.read_text(encoding="utf-8"))}


def test_every_message_is_in_the_source(texts: set[str]) -> None:
    rows, _ = read_rows()
    assert len(rows) > 30
    missing = [row[0] for row in rows if not any(make_pattern(row[0]).search(text) for text in texts)]
    assert not missing, "launch/README.md has messages that dpgen does not print (any more)"


def find_exceptions() -> dict[str, int | None]:
    """Return the subclasses of DpgenError in the source, with their exit status where the class alone has one."""
    statuses: dict[str, int | None] = {"DpgenError": 1}
    constants = {"EXIT_FAILED": 1, "EXIT_USAGE": 2, "EXIT_RESUMABLE": 75}
    classes = [
        node
        for path in sorted((REPO / "dpgen").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    for _ in range(4):  # a subclass of a subclass
        for node in classes:
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in statuses:
                    statuses[node.name] = statuses[base.id]
                    for line in node.body:
                        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "exit_status":
                            statuses[node.name] = constants[ast.unparse(line.value)]
    return statuses


def test_every_exception_has_a_row_with_its_exit_status() -> None:
    rows, _ = read_rows()
    named = {re.findall(r"\w+", row[1])[0] for row in rows}
    statuses = find_exceptions()
    assert statuses["JoinFailed"] == 75 and statuses["ConfigError"] == 2 and "TransferStopped" in statuses
    assert named == set(statuses)
    for message, exception, _ in rows:
        name, _, shown = exception.replace("`", "").partition(", ")
        if name not in ("PeerFailed", "PeerLost", "StoreLost", "EngineError"):  # each instance has its own
            assert shown == str(statuses[name]), message


def test_every_exit_status_of_a_failure_has_a_row() -> None:
    rows, _ = read_rows()
    assert {"1", "2", "75"} <= {status for row in rows for status in re.findall(r"\d+", row[1])}


def test_every_message_of_vllm_is_in_vllm() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    _, rows = read_rows()
    assert rows
    for message in {row[0].strip("`") for row in rows} - NOT_OF_VLLM:
        command = ["grep", "-rqF", "--include=*.py", message, str(Path(found.origin).parent)]
        assert subprocess.run(command, check=False).returncode == 0, f"vLLM does not say {message!r} (any more)"
