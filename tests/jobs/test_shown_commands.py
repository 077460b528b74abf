"""The commands of README.md and the guides do what they say, with the fake engine in place of models and GPUs.

Each block's commands run in the order of their page, in a folder for each page. Configurations are the shipped ones,
but for the model, the engine's fields and data that are elsewhere. Launchers are left out but for one command of each:
the others start the same program, and tests/structure/test_shown_commands.py checks the launchers' own options.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.batch_files import make_chat
from helpers.jobs import REPO, Launcher, run_each_command, write_into
from helpers.shown_commands import FOREIGN, PAGES, ShownCommand, get_dpgen_arguments, list_commands

# Runs each list of arguments in its folder, one after the other in one process, and reports status and output.
PROGRAM = """
import contextlib, io, json, os, sys
from dpgen.cli import main

for folder, arguments in json.loads(sys.argv[1]):
    os.chdir(folder)
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()) as stdout:
        status = main(arguments)
    print("REPORT " + json.dumps([status, stdout.getvalue(), stderr.getvalue()]), flush=True)
    if status:
        sys.exit(f"failed: dpgen {arguments}")  # commands after it may wait for its files
"""
ROW = {
    **{"question": "What is 1 + 1?", "answer": "2", "article": "News."},
    "messages": [{"role": "user", "content": "hello"}],
}
ENGINE = {"step_s": 0.002}  # a step that can be measured
IS_SCRIPT = ("bash", "source", "python")
# Not run here: the installer, the demo and the tests run themselves; programs that measure take minutes, and their
# options are checked.
SKIPPED_PAGES = ("benchmarks/README.md",)


def make_workspace(folder: Path) -> None:
    """Fill a folder with what the commands name: configurations, and inputs."""
    (folder / "conf").mkdir(parents=True)
    for name in ("conf/demo", "benchmarks"):
        (folder / name).symlink_to(REPO / name)
    for path in (REPO / "conf").glob("*.yaml"):
        configuration = replace_what_is_elsewhere(yaml.safe_load(path.read_text(encoding="utf-8")))
        (folder / "conf" / path.name).write_text(yaml.safe_dump(configuration))
    write_into(folder, [ROW, ROW], run={"dir": "runs/conf"}, data={"prompt_column": "question"}, engine=ENGINE)
    shutil.copy(folder / "rows.jsonl", folder / "articles.jsonl")
    (folder / "tuned.yaml").write_text("engine:\n  max_num_seqs: 8\n")  # as `dpgen tune` writes it
    (folder / "requests.jsonl").write_text(make_chat("a", model="Qwen/Qwen3-8B") + "\n")


def replace_what_is_elsewhere(configuration: dict[str, Any]) -> dict[str, Any]:
    """Put the fake engine and rows of this test in place of a model, an engine's fields, and data of the Hub."""
    configuration["run"]["engine"], configuration["model"], configuration["engine"] = "fake", "none", {}
    data = configuration["data"]
    if not (REPO / data["path"]).exists():
        data["path"] = "articles.jsonl"
    for key in ("name", "split", "chat_template_kwargs"):
        data.pop(key, None)
    if "check" in configuration:  # the fake engine writes no JSON, and repeats itself
        configuration["check"] = {"non_empty": True}
        configuration.get("output", {}).pop("parse", None)
    return configuration


def fit(command: ShownCommand) -> list[str] | None:
    """Return the arguments of `dpgen` that run a shown command here; None if another test runs it, or nothing can."""
    if command.words[0] in IS_SCRIPT or " ".join(command.words) in FOREIGN:
        return None
    arguments = get_dpgen_arguments(command.words)
    assert arguments is not None, f"no rule runs this command: {command}"
    name, *rest = arguments
    rest = [argument for argument in rest if argument != "key=value"]
    if name == "tune":  # two rows are too few to measure; tests/commands/test_tune_command.py has more
        return None
    if name == "simulate":  # thousands of ranks take minutes
        rest[rest.index("--ranks") + 1] = "1,2"
        rest += ["--rows", "500"] if "--lengths" in rest else []
    if name == "run-batch":
        rest += ["run.engine=fake"]
    return [name, *rest]


@pytest.mark.slow
def test_every_command_that_the_pages_show_runs(
    tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = tmp_path / "bin" / "sbatch"
    submit.parent.mkdir()
    submit.write_text(f"#!/bin/bash\nbash -n && echo Submitted batch job 1 | tee {tmp_path / 'submitted'}\n")
    submit.chmod(0o755)
    monkeypatch.setenv("PATH", str(submit.parent), prepend=":")
    shown: list[ShownCommand] = []
    commands: list[list[object]] = []
    for number, page in enumerate(page for page in PAGES if page not in SKIPPED_PAGES):
        folder = tmp_path / f"page-{number}"
        make_workspace(folder)
        fitted = [(command, fit(command)) for command in list_commands(page) if command.in_block]
        if page == "conf/README.md":  # it speaks of earlier runs
            earlier = [["run", "conf/demo.yaml", "data.limit=3"], ["run", "conf.yaml", "run.dir=runs/first"]]
            fitted[:0] = [(ShownCommand(page, tuple(arguments), True), arguments) for arguments in earlier]
        for command, arguments in fitted:
            if arguments is not None:
                shown.append(command)
                commands.append([str(folder), arguments])
    reports = run_each_command(launcher, PROGRAM, commands)  # type: ignore[arg-type]
    for command, (status, stdout, stderr) in zip(shown, reports, strict=True):
        assert status == 0, f"{command}\n{stdout}\n{stderr}"
    assert (tmp_path / "submitted").exists(), "a script was submitted, and bash can read it"
    folder = tmp_path / "page-0"
    assert (folder / "runs" / "first" / "_SUCCESS").exists()
    assert len((folder / "responses.jsonl").read_text().splitlines()) == 1
    assert (folder / "sound.parquet").exists()


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_the_first_two_commands_run_under_their_launchers(launch: str, tmp_path: Path) -> None:
    command = next(command for command in list_commands("README.md") if command.words[0] == launch)
    arguments = fit(command)
    assert arguments is not None and "conf.yaml" in arguments
    make_workspace(tmp_path / "work")
    launcher = Launcher(tmp_path, cwd=tmp_path / "work")
    try:
        jobs = (
            [launcher.dpgen(*arguments, ranks=2)]
            if launch == "torchrun"
            else launcher.start_like_srun(*arguments, rank_arguments=[[], []])
        )
        assert [job.wait() for job in jobs] == [0] * len(jobs), jobs[0].output
    finally:
        for job in launcher.jobs:
            job.end()
    assert json.loads((tmp_path / "work" / "runs" / "conf" / "_SUCCESS").read_text())["num_rows"] == 2
