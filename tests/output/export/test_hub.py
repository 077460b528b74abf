"""Test pushing an export to a stand-in of the Hub, with the real client in processes of its own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.dataset_files import make_run
from helpers.hub import TOKEN, HubStandIn
from helpers.jobs import REPO, wait_for

from dpgen.journal.run_dir import RunDir
from dpgen.records import Completion, RowError, RowResult

# Exports with each list of arguments in turn, in shards of a few rows, and reports status, stdout and stderr of each.
PROGRAM = """
import contextlib, io, json, sys
from dpgen.cli import main
from dpgen.output.export import formats

formats._ROW_GROUP_BYTES, formats._SHARD_BYTES = 5_000, 20_000
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(["export", *arguments])
    print("REPORT " + json.dumps([status, output.getvalue(), error.getvalue()]), flush=True)
"""
SECRET = "hf_" + "a1B2" * 9
NUM_ROWS = 200


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


def make_long_run(folder: Path) -> RunDir:
    """Make a run whose rows fill several shards, with secrets in its texts."""
    table = pa.table({"question": [f"question {row} " * 20 for row in range(NUM_ROWS)]})
    results: list[RowResult] = [RowResult(row, 7, (Completion(f"answer {row}", "stop", 3),)) for row in range(NUM_ROWS)]
    results[5] = RowResult(5, error=RowError("prompt_too_long", "9 tokens"))
    data = {"as_chat": True, "system_prompt": f"Call the API with {SECRET}."}
    return make_run(folder, table, results, data=data, sampling={"temperature": 0.7})


def start_exports(
    hub: HubStandIn, folder: Path, commands: list[list[str]], **environment: str
) -> subprocess.Popen[str]:
    variables = {
        **{"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO), "HF_HOME": str(folder / "hf"), "HF_TOKEN": TOKEN},
        **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", **environment},
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_exports(hub: HubStandIn, folder: Path, commands: list[list[str]], **environment: str) -> list[Any]:
    """Return status, stdout and stderr of each command."""
    output, _ = start_exports(hub, folder, commands, **environment).communicate(timeout=120)
    reports = [json.loads(line.removeprefix("REPORT ")) for line in output.splitlines() if line.startswith("REPORT ")]
    assert len(reports) == len(commands), output
    assert TOKEN not in output
    return reports


def read_repository(hub: HubStandIn, name: str) -> list[dict[str, Any]]:
    shards = sorted(path for path in hub.files[name] if path.endswith(".parquet"))
    return [row for path in shards for row in pq.read_table(io.BytesIO(hub.files[name][path])).to_pylist()]


@pytest.mark.slow
def test_an_upload_that_broke_off_is_continued_where_it_stopped(hub: HubStandIn, tmp_path: Path) -> None:
    run = make_long_run(tmp_path)
    hub.max_uploads = 2
    arguments = [str(run.path), "--push-to-hub", "answers", "--private"]
    process = start_exports(hub, tmp_path, [arguments])
    assert hub.is_blocking.wait(120)
    wait_for(lambda: len(hub.uploads) == 2)
    process.kill()
    process.communicate()
    assert hub.commits == [] and (run.path / ".hub-export").is_dir()

    hub.max_uploads = None
    [[status, output, error]] = run_exports(hub, tmp_path, [arguments])
    assert (status, error) == (0, "")
    assert output.startswith(f"exported {NUM_ROWS:,} rows (1 with an error) to {hub.endpoint}/datasets/me/answers: ")
    assert len(hub.uploads) == len(set(hub.uploads)) > 3, "no file was uploaded twice"
    assert hub.commits == [f"Export {NUM_ROWS:,} rows with dpgen"] and hub.private == {"me/answers"}
    assert [row["row_id"] for row in read_repository(hub, "me/answers")] == list(range(NUM_ROWS))
    assert not (run.path / ".hub-export").exists()

    card = hub.files["me/answers"]["README.md"].decode()
    assert SECRET not in card and "Call the API with <removed>." in card and str(tmp_path) not in card
    for text in ("- n<1K", "temperature: 0.7", "| `num_generated_tokens` | 3 |", "`prompt_too_long` 1", "## Licence"):
        assert text in card
    assert "torchrun --nproc-per-node 1 -m dpgen run config.yaml" in card


@pytest.mark.slow
def test_a_later_export_replaces_the_files_of_the_earlier_one(hub: HubStandIn, tmp_path: Path) -> None:
    run = make_long_run(tmp_path)
    arguments = [str(run.path), "--push-to-hub", "me/answers"]
    first, second = run_exports(hub, tmp_path, [arguments, [*arguments, "--columns", "row_id", "--only-successful"]])
    assert (first[0], second[0]) == (0, 0), (first, second)
    rows = read_repository(hub, "me/answers")
    assert rows == [{"row_id": row} for row in range(NUM_ROWS) if row != 5], "no shard of the first export is left"
    assert "1 row with a result were left out" in hub.files["me/answers"]["README.md"].decode()


def test_what_no_export_wrote_is_not_overwritten_unasked_and_errors_name_the_next_step(
    hub: HubStandIn, tmp_path: Path
) -> None:
    run = make_run(tmp_path, pa.table({"q": ["x"]}), [RowResult(0, 1, (Completion("a", "stop", 1),))])
    hub.files["me/mine"] = {"README.md": b"# mine", "data.csv": b""}
    push = [str(run.path), "--push-to-hub"]
    refused, public, bad_name, forced = run_exports(
        hub,
        tmp_path,
        [[*push, "me/mine"], [*push, "me/mine", "--private"], [*push, "a/b/c"], [*push, "me/mine", "--overwrite"]],
    )
    assert refused[0] == 2 and "is there already, and no dpgen export wrote it (README.md, data.csv)" in refused[2]
    assert public[0] == 2 and "is there already and is public" in public[2]
    assert bad_name[0] == 2 and bad_name[2].startswith("dpgen export: --push-to-hub a/b/c: ")
    assert forced[0] == 0 and set(hub.files["me/mine"]) == {"README.md", "data.csv", "train-00000-of-00001.parquet"}

    [refused] = run_exports(hub, tmp_path, [[*push, "me/new"]], HF_TOKEN=SECRET)
    assert refused[0] == 2 and "check HF_TOKEN" in refused[2] and SECRET not in refused[2]
    [no_hub] = run_exports(hub, tmp_path, [[*push, "me/new"]], HF_ENDPOINT="http://127.0.0.1:1")
    assert no_hub[0] == 75 and "The same command continues it" in no_hub[2], no_hub
    assert all(error.count("\n") == 1 for _, _, error in (refused, public, bad_name, no_hub))
