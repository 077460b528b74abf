"""A run notices that a function of the user has changed, wherever its module is found, and without importing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpgen.config import loader
from dpgen.config.schema import Config
from dpgen.distributed.agreement import find_what_names_stand_for
from dpgen.distributed.group import SingleRankGroup
from dpgen.journal.code_identity import find_module_file, identify_code
from dpgen.journal.run_identity import compute_run_identity, diff_identities

LOAD = ["run.dir=out", "model=m", "data.path=rows.jsonl", "data.prompt_column=p"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*overrides: str) -> Config:
    return loader.load([], [*LOAD, *overrides])


def identify(*overrides: str) -> dict[str, Any]:
    config = load(*overrides)
    code, _ = identify_code(config)
    return compute_run_identity(config, {"num_rows": 1}, {"code": code} if code else {})


@pytest.mark.parametrize("key", ["check.function=own_checks:f", "engine.logits_processors=[own_checks:F]"])
def test_a_changed_function_is_another_run_and_its_name_says_why(folder: Path, key: str) -> None:
    path = folder / "own_checks.py"
    path.write_text("raise SystemExit('never imported here')")
    before = identify(key)
    assert diff_identities(before, identify(key)) == []
    path.write_text("changed")
    [difference] = diff_identities(before, identify(key))
    assert difference.startswith(f"the source of {key.replace('[', '').replace(']', '')}: ")


def test_a_function_whose_source_is_gone_or_that_is_another_is_compared_by_its_name(folder: Path) -> None:
    path = folder / "own_checks.py"
    path.write_text("")
    before = identify("check.function=own_checks:f")
    differences = diff_identities(before, identify("check.function=own_checks:g"))
    assert differences == ['check.function: "own_checks:f" → "own_checks:g"']
    path.unlink()
    assert identify_code(load("check.function=own_checks:f")) == ({}, []), "the check's own start names the module"
    without_source = identify("check.function=own_checks:f")
    assert diff_identities(before, without_source) == diff_identities(without_source, before) == []


def test_a_function_without_a_source_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = find_what_names_stand_for(load("check.function=sys:exit", "run.engine=fake"), SingleRankGroup())
    assert "code" not in found
    assert caplog.messages == [
        "check.function=sys:exit: its source can't be found, so that a run does not notice if it changes"
    ]


def test_a_run_of_an_older_version_resumes(folder: Path) -> None:
    (folder / "own_checks.py").write_text("")
    now = identify("check.function=own_checks:f")
    assert diff_identities({key: value for key, value in now.items() if key != "code"}, now) == []


def test_a_module_is_found_as_an_import_finds_it(folder: Path) -> None:
    for name in ("package/__init__.py", "package/inner.py", "space/deep/own.py"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit")
    assert find_module_file("package") == folder / "package/__init__.py"
    assert find_module_file("package.inner") == folder / "package/inner.py"
    assert find_module_file("space.deep.own") == folder / "space/deep/own.py", "folders without __init__.py"
    assert find_module_file("json.decoder") is not None
    for name in ("sys", "space", "package.none", "package.inner.none", "none.at.all"):
        assert find_module_file(name) is None, name
