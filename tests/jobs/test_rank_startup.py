"""Start-up of the ranks: how they join, share the prepared data and the KV cache size, and fail together."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.jobs import (
    REPO,
    Launcher,
    WriteConfig,
    find_engine_pids,
    load_result,
    make_numbered_rows,
    read_run_json,
    wait_for,
)
from helpers.results import load_all_rows

from dpgen.distributed.ports import derive_job_ports
from dpgen.distributed.store_discovery import discover_store

pytestmark = pytest.mark.multi


@pytest.mark.slow
def test_ranks_read_their_place_from_the_variables_of_slurm(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    jobs = launcher.start_like_srun("run", write_config(make_numbered_rows(20)), rank_arguments=[[], [], []])
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    assert len(load_result(tmp_path / "run")) == 20
    assert "20 rows over 3 ranks" in jobs[0].output


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_ranks_join_even_if_another_program_listens_on_the_first_port_of_their_job(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, late: int
) -> None:
    with occupy_first_port() as (job_id, second_port):
        conf = write_config(make_numbered_rows(20))
        jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], []], SLURM_JOB_ID=job_id, MASTER_PORT="")
        jobs[late].process.send_signal(signal.SIGSTOP)  # before this rank has started to join
        if late == 0:
            time.sleep(5)  # rank 1 has queried in vain
        else:  # rank 0 waits for rank 1 now, and answers queries
            assert discover_store("localhost", [second_port], f"SLURM job {job_id}, step 0, restart 0", 60) > 0
        jobs[late].process.send_signal(signal.SIGCONT)
        assert [job.wait(90) for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    assert len(load_result(tmp_path / "run")) == 20
    assert "20 rows over 2 ranks" in jobs[0].output
    assert "[W" not in jobs[1].output and "Exception" not in jobs[1].output


def test_a_rank_that_never_starts_is_waited_for_as_long_as_the_variable_says(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    conf = write_config(make_numbered_rows(2))
    rank_programs = {1: ["-c", "pass"]}
    job, _ = launcher.start_like_srun(
        "run", conf, rank_arguments=[[], []], rank_programs=rank_programs, DPGEN_JOIN_TIMEOUT_S="0.5"
    )
    assert job.wait() == 75
    expected = "dpgen: stopped: 1 of 2 ranks did not start within 0.5 s (DPGEN_JOIN_TIMEOUT_S; missing: 1). "
    assert job.output.startswith(expected), job.output


@pytest.mark.slow
def test_a_signal_to_one_rank_while_the_ranks_join_ends_the_others_too(
    launcher: Launcher, write_config: WriteConfig
) -> None:
    conf = write_config(make_numbered_rows(2))
    *jobs, _ = launcher.start_like_srun("run", conf, rank_arguments=[[]] * 3, rank_programs={2: ["-c", "pass"]})
    wait_for(lambda: "waiting for 1 of 3 ranks to start (missing: 2)" in jobs[0].output)
    engines = [engine for job in jobs for engine in find_engine_pids(job)]
    jobs[1].process.send_signal(signal.SIGTERM)
    assert [job.wait() for job in jobs] == [75, 75], jobs[0].output + jobs[1].output
    assert "rank 1 left while the ranks joined: interrupted by SIGTERM before the run started" in jobs[0].output
    assert len(engines) == 2
    wait_for(lambda: not any(Path(f"/proc/{engine}").exists() for engine in engines))


@pytest.mark.parametrize(("rank_1", "status"), [([], 0), (["run.nonsense=1"], 2)], ids=["a good job", "a wrong one"])
def test_a_ranks_engine_starts_before_the_ranks_have_joined_and_ends_if_there_is_no_job(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, rank_1: list[str], status: int
) -> None:
    jobs = launcher.start_like_srun("run", write_config(make_numbered_rows(4)), rank_arguments=[[], rank_1])
    jobs[1].process.send_signal(signal.SIGSTOP)
    wait_for(lambda: bool(find_engine_pids(jobs[0])))
    [engine] = find_engine_pids(jobs[0])
    jobs[1].process.send_signal(signal.SIGCONT)
    assert [job.wait() for job in jobs] == [status, status], jobs[0].output + jobs[1].output
    assert not Path(f"/proc/{engine}").exists()
    if status == 0:
        [life] = (tmp_path / "run" / "logs" / "rank-0.engine.log").read_text().splitlines()
        assert life.endswith(f"pid {engine}"), "no other engine was started"
    else:
        errors = [line for job in jobs for line in job.output.splitlines() if "error" in line]
        assert len(errors) == 1 and "run.nonsense" in errors[0], errors


@contextmanager
def occupy_first_port() -> Iterator[tuple[str, int]]:
    """Listen on the first port of a SLURM job without ever answering; yield the job's id and its second port."""
    for job in range(os.getpid(), os.getpid() + 100):
        first, second = derive_job_ports(job, 0)[:2]
        try:
            server = socket.create_server(("127.0.0.1", first))
        except OSError:
            continue
        with server:
            yield str(job), second
            return
    pytest.fail("no job found whose first port is free")


@pytest.mark.slow
def test_every_rank_gets_the_smallest_kv_cache(launcher: Launcher, write_config: WriteConfig, tmp_path: Path) -> None:
    sizes = [[f"engine.kv_cache_memory_bytes={number << 20}"] for number in (8, 2, 4)]
    jobs = launcher.start_like_srun("run", write_config(make_numbered_rows(5)), rank_arguments=sizes)
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    assert read_run_json(tmp_path / "run")["engine"]["num_kv_blocks"] == 2048
    assert "KV cache: 2,048 blocks of 16 tokens on every rank (2 MiB of 8 MiB free here)" in jobs[0].output


# A rank that prints whether it finds its data in the cache of `datasets`, and takes a second to prepare it.
SLOW_TO_PREPARE = """
import os, sys, time
from pathlib import Path
from dpgen.data import input_loading

load = input_loading.load_input

def slow_load(*args, **kwargs):
    is_ready = any(Path(os.environ["HF_DATASETS_CACHE"]).rglob("*.arrow"))
    if not is_ready:
        time.sleep(1)
    sys.stderr.write(f"rank {os.environ['RANK']}: {'finds it ready' if is_ready else 'prepares it'}\\n")
    return load(*args, **kwargs)

input_loading.load_input = slow_load
from dpgen.__main__ import main
main()
"""


@pytest.mark.slow
def test_one_rank_per_node_prepares_the_data_while_the_others_wait(
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
    reports = sorted(re.findall(r"rank \d: (?:prepares it|finds it ready)", job.output))
    assert reports == ["rank 0: prepares it", "rank 1: finds it ready", "rank 2: finds it ready"], job.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("ModuleNotFoundError(\"No module named 'vllm'\", name='vllm')", "pip install '.[gpu]' in dpgen's checkout"),
        ("ImportError('libcuda.so.1: cannot open shared object file')", "the NVIDIA driver is missing"),
    ],
)
def test_a_machine_without_vllm_is_told_once_what_to_install(
    error: str, advice: str, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(f"raise {error}\n")
    conf = write_config(make_numbered_rows(2), run={"engine": "vllm"}, model=str(REPO / "conf" / "demo" / "model"))
    job = launcher.dpgen("run", conf, PYTHONPATH=f"{tmp_path}:{REPO}")
    assert job.wait() == 2, job.output
    assert job.output.startswith("dpgen: error: vLLM can't be imported") and advice in job.output
    assert "Traceback" not in job.output and "retrying" not in job.output


@pytest.mark.slow
def test_a_model_that_no_rank_can_load_is_one_error(launcher: Launcher, write_config: WriteConfig) -> None:
    jobs = launcher.start_like_srun(
        "run",
        write_config(make_numbered_rows(50), engine={"load_error": "no such device"}),
        rank_arguments=[[], [], []],
    )
    assert [job.wait() for job in jobs] == [1, 1, 1]
    outputs = "".join(job.output for job in jobs)
    assert outputs.count("dpgen: error") == 1, "the first cause is reported once"
    assert "the engine failed: RuntimeError: no such device" in outputs


@pytest.mark.slow
@pytest.mark.parametrize("agreement", ["true", "false"], ids=["with the KV agreement", "without it"])
def test_a_rank_whose_engine_cannot_load_the_model_leaves_its_rows_to_the_others(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, agreement: str
) -> None:
    jobs = launcher.start_like_srun(
        "run",
        write_config(make_numbered_rows(50), parallel={"sync_kv_cache": agreement == "true"}),
        rank_arguments=[["engine.load_error=no such device"], [], ["engine.load_s=1"]],
    )
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    assert "no such device, continuing without this rank's engine, leaving its rows to other ranks" in jobs[0].output
    assert not [row for row in load_all_rows(tmp_path / "run", 50) if row["error"]]
