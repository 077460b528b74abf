"""`dpgen preview` and `dpgen run --dry-run`: options, output, exit status; tests/monitoring tests what is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO, Launcher, WriteConfig, make_numbered_rows, run_each_command

from dpgen.cli import main

KEYS = {
    *("model", "num_rows", "num_examined", "is_sample", "max_model_len", "token_counter", "tokens", "num_sound"),
    *("errors", "prompts", "order", "num_ranks", "ranks_per_engine", "ranks", "used_columns", "unused_columns"),
    *("notes", "all_fail", "estimate"),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def preview_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["preview", *arguments, "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_json_has_one_object_with_stable_keys(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    shown = preview_json(capsys, write_config([*make_numbered_rows(4), {"prompt": None}]), "--ranks", "2")
    assert shown.keys() == KEYS
    assert shown["prompts"][0]["text"] == "row number 0"
    assert shown["prompts"][0]["token_ids"] == list(b"row number 0")
    assert shown["prompts"][0]["sampling"]["seed"]["origin"] == "run.seed and the row's index"
    assert shown["errors"] == [
        {"type": "wrong_type", "num_rows": 1, "rows": [4], "example": "prompt is null, not a string"}
    ]
    assert shown["tokens"]["histogram"] == [{"fewest": 12, "most": 12, "num_rows": 4}]
    assert [part["num_rows"] for part in shown["ranks"]] == [3, 2]
    assert shown["estimate"]["num_prompt_tokens"] == 48


def test_rows_and_row_choose_the_prompts(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    conf = write_config(make_numbered_rows(9))
    for options, rows in ((["--rows", "5"], [0, 1, 2, 3, 4]), (["--rows", "0"], []), (["--row", "7"], [7])):
        assert [prompt["row"] for prompt in preview_json(capsys, conf, *options)["prompts"]] == rows
    assert main(["preview", conf, "--row", "17"]) == 2
    assert capsys.readouterr().err == "dpgen: error: --row=17: the input has 9 rows, counted from 0\n"


def test_sample_limits_the_examined_rows(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    shown = preview_json(capsys, write_config(make_numbered_rows(50)), "--sample", "10")
    assert (shown["num_examined"], shown["is_sample"]) == (10, True)


def test_broken_rows_do_not_fail_a_preview(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", write_config([{"prompt": None}] * 3)]) == 0
    output = capsys.readouterr().out
    assert output.count("EVERY EXAMINED ROW FAILS") == 2 and output.endswith("a run would generate nothing\n")


def test_numbers_that_no_engine_takes_do_not_end_a_preview(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "x", "number": 10**digits} for digits in (0, 1, 20, 400)]
    columns = {"n": "number", "max_tokens": "number"}
    shown = preview_json(capsys, write_config(rows, sampling={"from_columns": columns}))
    assert shown["num_examined"] == 4
    assert shown["estimate"]["num_prompt_tokens"] == 1 + 10 + 1 + 1, "samples that no engine makes are not counted"


WRONG = (
    *(["data.prompt_column=promt"], ["run.sed=3"], ["engine.max_seqs=3"], ["data.path=nowhere.jsonl"]),
    *(["model=", "a=b"], ["run.dir=/dev/null"], ["data.template=x", "data.limit=-1"]),
)


def test_a_wrong_configuration_ends_with_status_2_and_the_message_of_the_run(
    write_config: WriteConfig, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = write_config(make_numbered_rows(3))
    commands = [["run", conf, *overrides, *dry] for overrides in WRONG for dry in ([], ["--dry-run"])]
    commands.append(["run", conf, "--dry-rn"])
    *reports, (status, _, error, _) = run_each_command(launcher, EACH_IN_TURN, commands)
    assert (
        status == 2 and error == "dpgen: error: unknown option --dry-rn, did you mean --dry-run? see dpgen run --help\n"
    )
    for overrides, ran, dry in zip(WRONG, reports[::2], reports[1::2], strict=True):
        assert main(["preview", conf, *overrides]) == ran[0] == dry[0] == 2, overrides
        previewed = capsys.readouterr()
        assert previewed.err == ran[2] == dry[2] and not previewed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no configuration; usage: dpgen preview CONFIG.yaml"),
        (["CONF", "--ranks", "0"], "--ranks=0: must be at least 1"),
        (["CONF", "--rows", "-1"], "--rows=-1: must be at least 0"),
        (["CONF", "--sample", "0"], "--sample=0: must be at least 1"),
        (["CONF", "--calibrate", "nowhere"], "--calibrate=nowhere: there is no run directory with finished rows"),
        (["CONF", "--lengths", "long"], "lengths=long: must be constant:TOKENS"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_status_2_and_one_line(
    options: list[str], message: str, write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = write_config(make_numbered_rows(3))
    assert main(["preview", *(conf if option == "CONF" else option for option in options)]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out


def test_the_number_of_ranks_is_the_launchers_and_only_rank_0_shows_the_preview(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = write_config(make_numbered_rows(9))
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert preview_json(capsys, conf)["num_ranks"] == 3
    monkeypatch.setenv("RANK", "1")
    for arguments in (["preview", conf], ["preview", conf, "run.sed=3"]):
        assert main(arguments) == 0
        output = capsys.readouterr()
        assert not output.out and not output.err


# Runs `dpgen` with each list of arguments in one process, since it takes the process's signals. Reports status, stdout,
# stderr, and the files beside the configuration.
EACH_IN_TURN = """
import contextlib, io, json, sys
from pathlib import Path
from dpgen.cli import main

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    files = sorted(map(str, Path(arguments[1]).parent.rglob("*")))
    print("REPORT " + json.dumps([status, out.getvalue(), err.getvalue(), files]), flush=True)
"""


def test_a_dry_run_shows_the_preview_and_writes_nothing_into_the_run_directory(
    write_config: WriteConfig, tmp_path: Path, launcher: Launcher
) -> None:
    conf = write_config(make_numbered_rows(4))
    commands = [["preview", conf], ["run", conf, "--dry-run"], ["run", conf], ["run", conf, "--dry-run"]]
    preview, dry, ran, again = run_each_command(launcher, EACH_IN_TURN, commands)
    assert [preview[0], dry[0], ran[0], again[0]] == [0, 0, 0, 0], ran[2]
    assert dry[1] == preview[1] and "rows that fail  none" in dry[1]
    run_dir = str(tmp_path / "run")
    assert run_dir not in preview[3] + dry[3] and run_dir in ran[3]
    assert again[3] == ran[3]
    assert "holds results of 4 rows; the preview is of all rows" in again[1]


def test_other_ranks_of_a_dry_run_are_quiet(write_config: WriteConfig, launcher: Launcher) -> None:
    conf = write_config(make_numbered_rows(4))
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    job = launcher.dpgen("run", conf, "--dry-run", "run.sed=3", **variables)
    assert (job.wait(), job.output) == (0, "")


def test_a_preview_starts_no_process_and_imports_no_vllm(
    write_config: WriteConfig,
) -> None:
    conf = write_config(make_numbered_rows(4))
    watch = (
        "import subprocess, sys\n"
        "def refuse(*arguments, **options): raise AssertionError('a process was started')\n"
        "from dpgen.cli import main\n"
        "import datasets\n"
        "subprocess.Popen.__init__ = refuse\n"
        "status = main(sys.argv[1:])\n"
        "print(*sorted({'vllm', 'rich'} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", watch, "preview", conf],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "\n", "rich is for terminals"
