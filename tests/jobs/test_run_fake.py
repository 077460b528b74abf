"""Whole runs with real processes, real torchrun and real gloo, and an engine without a model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.jobs import EACH_IN_TURN, Launcher, load_result, make_numbered_rows, run_each_command

from dpgen.distributed.ports import derive_job_ports
from dpgen.distributed.store_discovery import discover_store

pytestmark = pytest.mark.multi

WriteConfig = Callable[..., str]


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return load_result(tmp_path / "run")


def test_two_ranks_give_what_one_gives_in_input_order(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(101))
    assert launcher.dpgen("run", conf).wait() == 0
    alone = rows_of(tmp_path)
    # Each rank keeps to its shard: the first to be ready might do all of so little work.
    two = ["work.steal=false", f"run.dir={tmp_path / 'two' / 'run'}"]
    assert launcher.dpgen("run", conf, *two, ranks=2).wait() == 0
    together = load_result(tmp_path / "two" / "run")
    assert together == alone
    assert [row["row_id"] for row in together] == list(range(101))
    assert [row["prompt"] for row in together] == [row["prompt"] for row in make_numbered_rows(101)]
    assert all(row["generated_text"] and row["error"] is None for row in together)
    found = json.loads((tmp_path / "two" / "run" / "run.json").read_text())
    assert [each["num_rows"] for each in found["manifests"]] == [51, 50], "both ranks worked"


@pytest.mark.parametrize(("count", "ranks"), [(10, 3), (1, 2), (0, 2)])
def test_few_rows_are_an_ordinary_run(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, count: int, ranks: int
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(count)), ranks=ranks)
    assert job.wait() == 0, job.output
    assert json.loads((tmp_path / "run" / "_SUCCESS").read_text())["num_rows"] == count
    noun = "row" if count == 1 else "rows"
    assert f"{count} {noun} over {ranks} ranks" in job.output and f"done: {count} {noun}, 0 with" in job.output
    if count:  # `datasets` itself refuses to load a split without rows
        assert [row["row_id"] for row in rows_of(tmp_path)] == list(range(count))


def test_ranks_from_slurms_environment(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    jobs = launcher.start_like_srun("run", write_config(make_numbered_rows(20)), each=[[], [], []])
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    assert len(rows_of(tmp_path)) == 20
    assert "20 rows over 3 ranks" in jobs[0].output


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_ranks_meet_though_the_first_port_of_their_job_is_a_strangers(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, late: int
) -> None:
    with silent_stranger() as (job_id, second_port):
        conf = write_config(make_numbered_rows(20))
        jobs = launcher.start_like_srun("run", conf, each=[[], []], SLURM_JOB_ID=job_id, MASTER_PORT="")
        jobs[late].process.send_signal(signal.SIGSTOP)  # before it has come to joining
        if late == 0:
            time.sleep(5)  # the other has asked in vain
        else:  # rank 0 waits for the other now, and answers
            assert discover_store("localhost", [second_port], f"SLURM job {job_id}, step 0, restart 0", 60) > 0
        jobs[late].process.send_signal(signal.SIGCONT)
        assert [job.wait(90) for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    assert len(rows_of(tmp_path)) == 20
    assert "20 rows over 2 ranks" in jobs[0].output
    assert "[W" not in jobs[1].output and "Exception" not in jobs[1].output


@contextmanager
def silent_stranger() -> Iterator[tuple[str, int]]:
    """Listens on the first port of a job, and says nothing; the job's id and its second port."""
    for job in range(os.getpid(), os.getpid() + 100):
        first, second = derive_job_ports(job, 0)[:2]
        try:
            stranger = socket.create_server(("127.0.0.1", first))
        except OSError:
            continue
        with stranger:
            yield str(job), second
            return
    pytest.fail("no job found whose first port is free")


def test_the_smallest_kv_cache_is_everyones(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    sizes = [[f"engine.kv_cache_memory_bytes={number << 20}"] for number in (8, 2, 4)]
    jobs = launcher.start_like_srun("run", write_config(make_numbered_rows(5)), each=sizes)
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["engine"]["num_kv_blocks"] == 2048
    assert "KV cache: 2,048 blocks of 16 tokens on every rank (2 MiB; 8 MiB free here)" in jobs[0].output


@pytest.mark.slow
def test_a_rank_with_ten_times_the_work_is_waited_for(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(40), work={"steal": False}, sampling={"max_tokens": 10})
    jobs = launcher.start_like_srun("run", conf, each=[["engine.step_s=0.01"], ["engine.step_s=0.1"]])
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [each["num_rows"] for each in found["manifests"]] == [20, 20]


def test_a_rank_that_is_through_helps(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(400), sampling={"max_tokens": 4}, engine={"max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, each=[["engine.step_s=0.002"], ["engine.step_s=0.05"]])
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    fast, slow = (each["num_rows"] for each in json.loads((tmp_path / "run" / "run.json").read_text())["manifests"])
    assert fast > 300 and fast + slow == 400


@pytest.mark.slow
def test_a_slow_rank_that_leaves_the_end_to_the_other_ends_with_it(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    # For longer than ten seconds, after which ranks are judged; a row takes 0.4 s on the one, and 3 s on the other.
    conf = write_config(make_numbered_rows(600), sampling={"max_tokens": 20}, engine={"max_num_seqs": 8})
    jobs = launcher.start_like_srun("run", conf, each=[["engine.step_s=0.02"], ["engine.step_s=0.15"]])
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    fast, slow = json.loads((tmp_path / "run" / "run.json").read_text())["manifests"]
    assert fast["num_rows"] > 400 and fast["num_rows"] + slow["num_rows"] == 600
    assert [row["row_id"] for row in rows_of(tmp_path)] == list(range(600))


def test_rows_come_home_where_the_run_folder_is_not_shared(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), output={"gather_bytes": 1 << 16})
    folders = [[f"run.dir={tmp_path / f'node{rank}' / 'run'}"] for rank in range(3)]
    jobs = launcher.start_like_srun("run", conf, each=folders)
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    found = load_result(tmp_path / "node0" / "run")
    assert [row["row_id"] for row in found] == list(range(3000))
    run = json.loads((tmp_path / "node0" / "run" / "run.json").read_text())
    assert [each["sees_rank_0"] for each in run["manifests"]] == [True, False, False]
    most = max(each["num_bytes"] for each in run["manifests"][1:])
    assert run["gather_rounds"] == -(-most // ((1 << 16) // 3)), "rounds are bounded by output.gather_bytes"
    assert not (tmp_path / "node1" / "run" / "_SUCCESS").exists()


@pytest.mark.slow
def test_gathering_though_the_folder_is_shared_changes_nothing(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), output={"gather_bytes": 1 << 16})
    found, rounds, journals = {}, {}, {}
    for gather in ("auto", "always"):
        run_dir = tmp_path / gather / "run"
        job = launcher.dpgen("run", conf, f"run.dir={run_dir}", f"output.gather={gather}", ranks=2)
        assert job.wait() == 0, job.output
        found[gather] = load_result(run_dir)
        rounds[gather] = json.loads((run_dir / "run.json").read_text())["gather_rounds"]
        journals[gather] = sorted(path.name for path in (run_dir / "journal").iterdir())
    assert rounds["auto"] == 0 and rounds["always"] > 0
    assert found["always"] == found["auto"]
    assert [row["row_id"] for row in found["always"]] == list(range(300))
    assert journals["always"] == journals["auto"], "nothing of what was sent is left beside what was there"


@pytest.mark.slow
def test_a_rows_sampling_is_its_shards_whoever_generates_it(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{**row, "budget": 9 if index in (4, 7) else None} for index, row in enumerate(make_numbered_rows(200))]
    conf = write_config(
        rows,
        sampling={"max_tokens": 2, "from_columns": {"max_tokens": "budget"}},
        sampling_by_rank=[{"max_tokens": 3}, {"max_tokens": 5}, {"temperature": 0.5}],
        engine={"max_num_seqs": 4},
        work={"claim_rows": 4, "reserve_rows": 0},
    )
    found, num_rows = {}, {}
    for ranks, steps_s in {1: ["0"], 2: ["0.002", "0.05"], 3: ["0.002", "0.05", "0.002"]}.items():
        run_dir = tmp_path / str(ranks) / "run"
        each = [[f"engine.step_s={step_s}"] for step_s in steps_s]
        jobs = launcher.start_like_srun("run", conf, f"run.dir={run_dir}", each=each)
        assert [job.wait() for job in jobs] == [0] * ranks, jobs[0].output
        found[ranks] = load_result(run_dir)
        num_rows[ranks] = [each["num_rows"] for each in json.loads((run_dir / "run.json").read_text())["manifests"]]
    assert num_rows[2][1] < 100 and num_rows[3][1] < 67, "the slow rank's shard is done by others, too"
    assert found[2] == found[1] and found[3] == found[1]
    expected = [row["budget"] or (3, 5, 2)[index % 3] for index, row in enumerate(rows)]
    assert [row["num_generated_tokens"] for row in found[1]] == expected


def test_sampling_by_rank_is_part_of_what_a_run_is(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(4))
    assert launcher.dpgen("run", conf, "sampling_by_rank=[{max_tokens: 2}, {max_tokens: 3}]").wait() == 0
    for entries, shown in (("[{max_tokens: 2}]", '[{"max_tokens": 2}]'), ("[]", "null")):
        other = launcher.dpgen("run", conf, f"sampling_by_rank={entries}")
        assert other.wait() == 2
        assert f'sampling_by_rank: [{{"max_tokens": 2}}, {{"max_tokens": 3}}] → {shown}' in other.output, other.output
    assert [row["num_generated_tokens"] for row in rows_of(tmp_path)] == [2, 3, 2, 3]


# A rank that says what it finds in the cache of `datasets` when its turn has come, and takes a second to prepare it.
SLOW_TO_PREPARE = """
import os, sys, time
from pathlib import Path
import datasets

load = datasets.load_dataset

def slow_load(*args, **kwargs):
    is_ready = any(Path(os.environ["HF_DATASETS_CACHE"]).rglob("*.arrow"))
    if not is_ready:
        time.sleep(1)
    sys.stderr.write(f"rank {os.environ['RANK']}: {'finds it ready' if is_ready else 'prepares it'}\\n")
    return load(*args, **kwargs)

datasets.load_dataset = slow_load
from dpgen.__main__ import main
main()
"""


@pytest.mark.slow
def test_one_process_of_a_node_prepares_the_data_while_the_others_wait(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    program = tmp_path / "slow_to_prepare.py"
    program.write_text(SLOW_TO_PREPARE)
    job = launcher.dpgen(
        "run",
        write_config(make_numbered_rows(30)),
        ranks=3,
        program=[str(program)],
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    assert job.wait() == 0, job.output
    told = sorted(re.findall(r"rank \d: (?:prepares it|finds it ready)", job.output))
    assert told == ["rank 0: prepares it", "rank 1: finds it ready", "rank 2: finds it ready"], job.output


# ---- what a user does wrong


# (words of the command line, the error's), by what finds the error: the configuration, the input, the engine.
WRONG = [
    ("data.promt_column=x", "did you mean 'data.prompt_column'"),
    ("data.prompt_column=promt", "data.prompt_column: 'promt' is no column of the dataset; did you mean 'prompt'"),
    ("engine.max_num_seq=3", "unknown key 'engine.max_num_seq'; did you mean 'engine.max_num_seqs'"),
]
WRONG_TOO = [
    ("engine.max_num_seqs=0", "engine.max_num_seqs=0: it must be a whole number from 1"),
    ("sampling.max_token=3", "unknown key 'sampling.max_token'; did you mean 'sampling.max_tokens'"),
    (
        "sampling_by_rank=[{}, {max_token: 3}]",
        "unknown key 'sampling_by_rank[1].max_token'; did you mean 'sampling_by_rank[1].max_tokens'",
    ),
    (
        "sampling.from_columns={max_tokens: promp}",
        "max_tokens is to come from 'promp', which is no column of the dataset; did you mean 'prompt'",
    ),
    ("data.columns=[promt]", "data.columns: there is no column 'promt'; did you mean 'prompt'"),
    ("data.path=nowhere.jsonl", "no such file or folder: nowhere.jsonl"),
]


@pytest.mark.parametrize(("override", "words"), WRONG)
def test_a_wrong_configuration_is_told_once_and_exits_with_2(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, override: str, words: str
) -> None:
    jobs = launcher.start_like_srun("run", write_config(make_numbered_rows(3)), override, each=[[], []])
    assert [job.wait() for job in jobs] == [2, 2]
    output = "".join(job.output for job in jobs)
    assert output.count(words) == 1, output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "_SUCCESS").exists()


def test_other_wrong_configurations_are_told_in_the_same_way(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3))
    told = run_each_command(launcher, EACH_IN_TURN, [[conf, override] for override, _ in WRONG_TOO])
    for (_, words), (status, output) in zip(WRONG_TOO, told, strict=True):
        assert status == 2 and output.count(words) == 1 and "Traceback" not in output, output
    assert not (tmp_path / "run" / "_SUCCESS").exists()


def test_torchrun_shows_the_cause_once_and_last(launcher: Launcher, write_config: WriteConfig) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(3)), "engine.max_num_seq=3", ranks=2)
    assert job.wait() == 1, "torchrun's own status for whatever its workers exit with"
    assert job.output.count("did you mean 'engine.max_num_seqs'") == 1, job.output
    assert "did you mean" in "".join(job.output.splitlines()[-3:])
    assert job.output.count("exitcode  : 2") == 2


def test_a_column_of_the_inputs_that_collides_is_refused(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": "p", "error": "mine"}]
    job = launcher.dpgen("run", write_config(rows))
    assert job.wait() == 2
    assert "data.columns=[prompt]" in job.output
    assert launcher.dpgen("run", write_config(rows), "data.columns=[prompt]").wait() == 0
    assert rows_of(tmp_path)[0]["error"] is None


def test_a_finished_run_says_so_and_another_run_is_refused(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(5))
    assert launcher.dpgen("run", conf).wait() == 0
    marker = (tmp_path / "run" / "_SUCCESS").stat().st_mtime_ns
    again = launcher.dpgen("run", conf, "work.claim_rows=3", "engine.max_num_seqs=2")
    assert again.wait() == 0, "what does not change results may differ"
    assert "finished result already" in again.output
    other = launcher.dpgen("run", conf, "sampling.max_tokens=7")
    assert other.wait() == 2
    assert re.search(r"would give other results: sampling.max_tokens: null → 7", other.output), other.output
    changed = write_config([*make_numbered_rows(4), {"prompt": "new"}])
    other = launcher.dpgen("run", changed)
    assert other.wait() == 2
    assert "input.content" in other.output
    assert (tmp_path / "run" / "_SUCCESS").stat().st_mtime_ns == marker


def test_a_folder_of_something_else_is_left_alone(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    job = launcher.dpgen("run", write_config(make_numbered_rows(3)))
    assert job.wait() == 2
    assert "thesis.tex" in job.output


# ---- bad rows


def test_a_bad_row_costs_one_row(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "good", "budget": 3} for _ in range(12)]
    rows[2]["prompt"] = "x" * 600
    rows[5]["budget"] = -1
    rows[7]["prompt"] = None
    conf = write_config(rows, sampling={"from_columns": {"max_tokens": "budget"}})
    job = launcher.dpgen("run", conf, ranks=2)
    assert job.wait() == 0
    assert "1 bad_sampling, 1 prompt_too_long, 1 wrong_type; the first is row 2: prompt_too_long" in job.output
    found = rows_of(tmp_path)
    assert {row["row_id"]: row["error"]["type"] for row in found if row["error"]} == {
        2: "prompt_too_long",
        5: "bad_sampling",
        7: "wrong_type",
    }
    assert all(row["num_generated_tokens"] == 3 for row in found if not row["error"])
    assert all(row["generated_text"] is None for row in found if row["error"])


def test_a_run_whose_rows_all_fail_stops_and_shows_why(launcher: Launcher, write_config: WriteConfig) -> None:
    rows = [{"prompt": "x" * 600} for _ in range(300)]
    job = launcher.dpgen("run", write_config(rows), "run.max_leading_errors=100", ranks=2)
    assert job.wait() == 1
    assert job.output.count("rows all failed") == 1, job.output
    assert "prompt_too_long" in job.output


# ---- failures


def test_a_rank_that_fails_to_start_ends_all_with_its_cause(launcher: Launcher, write_config: WriteConfig) -> None:
    started_s = time.monotonic()
    jobs = launcher.start_like_srun(
        "run",
        write_config(make_numbered_rows(50)),
        each=[[], ["engine.load_error=no such device"], ["engine.load_s=2"]],
    )
    assert [job.wait(60) for job in jobs] == [1, 1, 1]
    assert time.monotonic() - started_s < 60
    assert "the engine failed: RuntimeError: no such device" in jobs[1].output
    assert all("dpgen: error" not in jobs[rank].output for rank in (0, 2)), "the first cause is told once"


# ---- the result's shape


def test_samples_token_ids_and_chosen_columns(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "keep": 1, "drop": 2}, {"prompt": None, "keep": 3, "drop": 4}]
    conf = write_config(
        rows, data={"columns": ["keep"]}, sampling={"n": 2, "max_tokens": 3}, output={"token_ids": True}
    )
    assert launcher.dpgen("run", conf).wait() == 0
    first, second = rows_of(tmp_path)
    assert list(first) == [
        "keep",
        "row_id",
        "generated_text",
        "finish_reason",
        "num_prompt_tokens",
        "num_generated_tokens",
        "error",
        "generated_token_ids",
    ]
    assert len(first["generated_text"]) == 2 and first["generated_text"][0] != first["generated_text"][1]
    assert first["num_generated_tokens"] == [3, 3]
    assert first["generated_token_ids"] == [[0, 1, 2], [0, 1, 2]]
    assert second["keep"] == 3 and second["generated_text"] is None


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_result_loads_wherever_its_first_error_stands(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, form: str
) -> None:
    rows: list[dict[str, Any]] = [*make_numbered_rows(24), {"prompt": None}]
    conf = write_config(rows, data={"columns": []}, output={"format": form, "rows_per_file": 10})
    assert launcher.dpgen("run", conf).wait() == 0
    found = rows_of(tmp_path)
    assert [row["row_id"] for row in found] == list(range(25)), "also where none of the input's columns is kept"
    assert [row["row_id"] for row in found if row["error"]] == [24]
    assert found[24]["error"]["type"] == "wrong_type" and found[0]["error"] is None


@pytest.mark.slow
def test_another_nodes_folder_of_another_run_is_refused(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(20), work={"steal": False})  # both nodes do some of so little work
    folders = [[f"run.dir={tmp_path / f'node{rank}'}"] for rank in range(2)]
    first = launcher.start_like_srun("run", conf, each=folders)
    assert [job.wait() for job in first] == [0, 0]
    again = launcher.start_like_srun("run", conf, each=folders)
    assert [job.wait() for job in again] == [0, 0], "finished, though rank 1 has no _SUCCESS of its own"
    shutil.rmtree(tmp_path / "node0")
    other = launcher.start_like_srun("run", conf, "sampling.max_tokens=3", each=folders)
    assert [job.wait() for job in other] == [2, 2], other[1].output
    assert "sampling.max_tokens: null → 3" in other[0].output + other[1].output


def test_rows_that_fail_early_do_not_hide_good_ones_that_are_being_generated(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{"prompt": None if index % 2 else "good"} for index in range(400)]
    conf = write_config(rows, engine={"max_num_seqs": 400, "step_s": 0.2})
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    assert sum(row["error"] is None for row in rows_of(tmp_path)) == 200


def test_jsonl_in_several_files(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    conf = write_config(make_numbered_rows(25), output={"format": "jsonl", "rows_per_file": 10})
    assert launcher.dpgen("run", conf).wait() == 0
    files = sorted(path.name for path in (tmp_path / "run" / "dataset").iterdir())
    assert files == ["README.md"] + [f"train-{number:05d}-of-00003.jsonl" for number in range(3)]
    assert [row["row_id"] for row in rows_of(tmp_path)] == list(range(25))


def test_jsonl_has_null_where_the_input_has_nan(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    nan, infinity = float("nan"), float("inf")
    rows = [
        {"prompt": "a", "score": 0.5, "more": {"scores": [1.0, 2.0]}},
        {"prompt": "b", "score": nan, "more": {"scores": [-infinity, nan, 3.0]}},
    ]
    data = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), data)
    conf = write_config([], data={"path": str(data)}, output={"format": "jsonl"})
    assert launcher.dpgen("run", conf).wait() == 0
    [file] = (tmp_path / "run" / "dataset").glob("*.jsonl")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]
    assert [(row["score"], row["more"]["scores"]) for row in found] == [(0.5, [1.0, 2.0]), (None, [None, None, 3.0])]
    assert [row["score"] for row in rows_of(tmp_path)] == [0.5, None], "and `datasets` loads it"
    verified = launcher.dpgen("verify", str(tmp_path / "run"))
    assert verified.wait() == 0, verified.output
