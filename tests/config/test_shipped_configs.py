"""Shipped configurations: each loads, and the reference file agrees with the code."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.jobs import REPO

from dpgen.config import loader, options, schema
from dpgen.distributed.topology import Topology
from dpgen.engine.fake_backend import FakeBackend
from dpgen.engine.starting.launch import build_engine_spec

SHIPPED = sorted((REPO / "conf").glob("*.yaml"))
HEAVY = {"torch", "vllm", "datasets", "transformers", "omegaconf", "numpy"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    config = loader.load([str(path)], [])
    assert config.run.dir and config.model and config.data.path, "a run could start from it"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_fake_engine_takes_every_shipped_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    spec = build_engine_spec(loader.load([str(path)], ["run.engine=fake"]), Topology(), None)
    assert FakeBackend(spec).check_options() == (), "it is taken without a note"


def test_the_reference_file_has_every_key_with_its_default_and_meaning() -> None:
    path = REPO / "conf" / "reference.yaml"
    text = path.read_text()
    given = yaml.safe_load(text)
    in_comments = " ".join(line.strip("# ") for line in text.splitlines() if line.lstrip().startswith("#"))
    keys = {name for name, body in given.items() if not isinstance(body, dict) or not body}
    keys |= {f"{section}.{key}" for section, body in given.items() if isinstance(body, dict) for key in body}
    assert keys == {name for name, _, _ in options.legal_keys()}
    for name, default, help in options.legal_keys():
        assert help in in_comments, f"{name}: its meaning in conf/reference.yaml is not the code's"
        section, _, key = name.partition(".")
        value = given[section][key] if key else given[section]
        if name not in ("run.dir", "model", "data.path", "data.prompt_column"):
            assert value == default, f"{name}: its default in conf/reference.yaml is not the code's"


@pytest.mark.parametrize("module", ["schema", "prompt", "checks", "loader"])
def test_importing_the_configuration_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, dpgen.config.{module}; print({HEAVY | {'yaml'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def get_childrens_processor_s() -> float:
    """Return the processor time of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["slurm", "--help"]])
def test_help_is_instant_and_imports_nothing_heavy(arguments: list[str]) -> None:
    watch = (
        "import sys; from dpgen.cli import main; status = main(sys.argv[1:]); "
        f"heavy = {HEAVY} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    for _ in range(5):  # a busy machine may slow down one or the other
        started_s = get_childrens_processor_s()
        subprocess.run([sys.executable, "-c", watch, *arguments], check=True, capture_output=True)
        if get_childrens_processor_s() - started_s < 0.5:
            return
    pytest.fail("help took half a second of processor time, each time")


def test_help_lists_every_key() -> None:
    shown = subprocess.run([sys.executable, "-m", "dpgen", "run", "--help"], check=True, capture_output=True, text=True)
    for name, _, help in options.legal_keys():
        assert name in shown.stdout
        assert help.split(";")[0][:40] in " ".join(shown.stdout.split())


@pytest.mark.parametrize(("arguments", "shown"), [([], "runs/demo"), (["data.limit=3", "run.dir=a b"], "a b")])
def test_the_demo_shows_the_run_directory_that_it_wrote(tmp_path: Path, arguments: list[str], shown: str) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(REPO / "launch" / "demo.sh", tmp_path / "launch")
    (tmp_path / "launch" / "install.sh").write_text("")
    for name in ("torchrun", "python"):
        stub = tmp_path / "bin" / name
        stub.write_text(f'#!/bin/bash\nprintf "%s|" {name} "$@"\n')
        stub.chmod(0o755)
    command = ["bash", str(tmp_path / "launch" / "demo.sh"), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "DPGEN_VENV": str(tmp_path)}, check=True, capture_output=True, text=True
    )
    assert "|".join(["conf/demo.yaml", *arguments, ""]) in done.stdout
    assert done.stdout.endswith(f"python|launch/show_demo.py|{shown}|")


def test_every_section_is_documented() -> None:
    for section in dataclasses.fields(schema.Config):
        if section.default_factory is not dict and dataclasses.is_dataclass(section.default_factory):
            assert section.default_factory.__doc__
