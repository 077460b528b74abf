"""Test `dpgen config`: each value with where it comes from, in a form that `dpgen run` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO

from dpgen.cli import main
from dpgen.config.loader import load, load_from_args
from dpgen.config.options import legal_keys

FIRST = """\
run: {dir: runs/a}
model: "007"
data:
  path: x.jsonl
  template: |
    Q: {{ question }} # 1
    A: ${{ x }}
sampling:
  temperature: 0.5
  stop: ["# no comment", "a: b"]
engine: {hf_token: hf_abcdefghijklmnopqrstuvwxyz}
"""
SECOND = """\
sampling:
  temperature: 0.7
  structured_outputs: {choice: [a, b]}
work:
  order: prefix
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(FIRST)
    (tmp_path / "b.yaml").write_text(SECOND)
    return ["a.yaml", "b.yaml", "run.seed=5", "sampling.structured_outputs.regex=x"]


def show(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["config", *arguments]) == 0
    output, error = capsys.readouterr()
    assert not error
    return output


def test_each_key_tells_where_its_value_comes_from(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    entries: dict[str, Any] = json.loads(show([*files, "--json"], capsys))
    sources = {key: entry["from"] for key, entry in entries.items() if entry["from"] != "default"}
    assert sources == {
        "run.dir": "a.yaml:1",
        "run.seed": "command line",
        "data.path": "a.yaml:4",
        "data.template": "a.yaml:5",
        "model": "a.yaml:2",
        "engine.hf_token": "a.yaml:11",
        "sampling.temperature": "b.yaml:2",
        "sampling.stop": "a.yaml:10",
        "sampling.structured_outputs": "b.yaml:3, command line",
        "work.order": "b.yaml:5",
    }
    assert entries["sampling.structured_outputs"]["value"] == {"choice": ["a", "b"], "regex": "x"}
    assert entries["engine.hf_token"]["value"] == "<removed>", "a secret is left out"
    assert set(entries) >= {name for name, _, _ in legal_keys()} - {"engine", "sampling"}


def test_the_output_is_a_configuration_of_the_same_values(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = show(files, capsys)
    assert "  temperature: 0.7  # b.yaml:2\n" in output and "  # a.yaml:5\n  template: " in output
    (tmp_path / "shown.yaml").write_text(output)
    before, after = load_from_args([*files, "engine={}"]), load(["shown.yaml"], ["engine={}"])
    assert vars(after) | {"engine": {}} == vars(before) | {"engine": {}}


@pytest.mark.parametrize("path", sorted((REPO / "conf").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_shown_as_one_that_resolves_to_the_same(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPO)
    shown = tmp_path / "shown.yaml"
    shown.write_text(show([str(path)], capsys))
    assert load([str(shown)], []) == load([str(path)], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration; usage: dpgen config CONFIG.yaml [key=value ...]"),
        (["none.yaml"], "no such configuration file: none.yaml"),
        (["a.yaml", "work.ordr=prefix"], "did you mean 'work.order'?"),
        (["a.yaml", "--schema"], "give no CONFIG.yaml with it"),
        (["a.yaml", "--jsn"], "unknown option --jsn, did you mean --json?"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_one_line(
    files: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *arguments]) == 2
    output, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not output
