"""Run directories on local disks: rank 0 gathers the rows of nodes whose run directory it cannot see."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.jobs import (
    SHORT_LEASE,
    Job,
    Launcher,
    WriteConfig,
    free_port,
    load_result,
    make_numbered_rows,
    read_run_json,
    wait_for,
)
from helpers.requirements import skip_or_fail
from helpers.results import count_journal_bytes, load_all_rows

pytestmark = pytest.mark.multi


@pytest.mark.slow
def test_rank_0_gathers_all_rows_if_the_run_directory_is_not_shared(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), output={"gather_bytes": 1 << 16})
    run_dirs = [[f"run.dir={tmp_path / f'node{rank}' / 'run'}"] for rank in range(3)]
    jobs = launcher.start_like_srun("run", conf, rank_arguments=run_dirs)
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    results = load_result(tmp_path / "node0" / "run")
    assert [row["row_id"] for row in results] == list(range(3000))
    run = read_run_json(tmp_path / "node0" / "run")
    assert [manifest["sees_rank_0"] for manifest in run["manifests"]] == [True, False, False]
    sent_bytes = [manifest["num_bytes"] for manifest in run["manifests"][1:]]
    assert run["gather_rounds"] * (1 << 16) >= sum(sent_bytes), "output.gather_bytes bounds each round"
    assert run["gather_rounds"] <= -(-max(sent_bytes) // ((1 << 16) // 3)), "no round is sent nearly empty"
    assert not (tmp_path / "node1" / "run" / "_SUCCESS").exists()


@pytest.mark.slow
def test_gathering_from_a_shared_run_directory_changes_nothing(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), output={"gather_bytes": 1 << 16})
    results, rounds, journals = {}, {}, {}
    for gather in ("auto", "always"):
        run_dir = tmp_path / gather / "run"
        job = launcher.dpgen("run", conf, f"run.dir={run_dir}", f"output.gather={gather}", ranks=2)
        assert job.wait() == 0, job.output
        results[gather] = load_result(run_dir)
        rounds[gather] = read_run_json(run_dir)["gather_rounds"]
        journals[gather] = sorted(path.name for path in (run_dir / "journal").iterdir())
    assert rounds["auto"] == 0 and rounds["always"] > 0
    assert results["always"] == results["auto"]
    assert [row["row_id"] for row in results["always"]] == list(range(300))
    assert journals["always"] == journals["auto"], "no copy of a segment is left beside the original"


@pytest.mark.slow
def test_a_run_directory_of_another_run_on_another_node_is_rejected(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(20), work={"steal": False})  # so that both nodes generate rows of so few
    run_dirs = [[f"run.dir={tmp_path / f'node{rank}'}"] for rank in range(2)]
    first = launcher.start_like_srun("run", conf, rank_arguments=run_dirs)
    assert [job.wait() for job in first] == [0, 0]
    again = launcher.start_like_srun("run", conf, rank_arguments=run_dirs)
    assert [job.wait() for job in again] == [0, 0], "the run is complete, though rank 1 has no _SUCCESS of its own"
    shutil.rmtree(tmp_path / "node0")
    other = launcher.start_like_srun("run", conf, "sampling.max_tokens=3", rank_arguments=run_dirs)
    assert [job.wait() for job in other] == [2, 2], other[1].output
    assert "sampling.max_tokens: null → 3" in other[0].output + other[1].output


@pytest.mark.slow
def test_segments_of_one_name_from_two_nodes_are_both_kept(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(200), engine={"step_s": 0.02, "max_num_seqs": 4})
    run_dirs = [tmp_path / f"node{rank}" for rank in range(2)]
    for run_dir in run_dirs:  # attempt 1 on one node, then on the other, each of which knows nothing of the other
        alone = launcher.dpgen("run", conf, f"run.dir={run_dir}")
        wait_for(lambda run_dir=run_dir: count_journal_bytes(run_dir) > 1000)
        alone.process.send_signal(signal.SIGTERM)
        assert alone.wait() == 75, alone.output
    names = [[path.name for path in (run_dir / "journal").iterdir()] for run_dir in run_dirs]
    assert names[0] == names[1], "the case of this test"
    first = (run_dirs[0] / "journal" / names[0][0]).read_bytes()
    together = [[f"run.dir={run_dir}"] for run_dir in run_dirs]
    jobs = launcher.start_like_srun("run", conf, "engine.step_s=0", rank_arguments=together)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    load_all_rows(run_dirs[0], 200)
    assert (run_dirs[0] / "journal" / names[0][0]).read_bytes() == first, "no journaled row is overwritten"


@pytest.mark.slow
def test_rows_of_a_rank_lost_on_another_node_are_gathered_by_that_nodes_first_rank(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        skip_or_fail("host names of their own need root and namespaces", "DPGEN_REQUIRE_NETNS")
    conf = write_config(make_numbered_rows(240), engine={"step_s": 0.02, "max_num_seqs": 4})
    port = str(free_port())
    jobs = [start_on_node(launcher, conf, rank, node, tmp_path, port) for rank, node in enumerate([0, 1, 1])]
    lost = tmp_path / "node1" / "run" / "journal" / "attempt-0001-rank-00002-part-0000.journal"
    wait_for(lambda: lost.exists() and lost.stat().st_size > 500, 120)
    os.kill(jobs[2].process.pid, signal.SIGKILL)
    assert [job.wait() for job in jobs[:2]] == [0, 0], jobs[0].output + jobs[1].output
    load_all_rows(tmp_path / "node0" / "run", 240)
    assert (tmp_path / "node0" / "run" / "journal" / lost.name).read_bytes() == lost.read_bytes()


def start_on_node(launcher: Launcher, conf: str, rank: int, node: int, folder: Path, port: str) -> Job:
    """Start one of three ranks on a node with a host name and a run directory of its own."""
    words = [launcher.python, "-m", "dpgen", "run", conf, f"run.dir={folder / f'node{node}' / 'run'}"]
    return launcher.start(
        ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"node{node}", *words],
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(max(0, rank - 1)),
        SLURM_STEP_NUM_TASKS="3",
        SLURM_STEP_NODELIST="localhost",
        SLURM_STEP_TASKS_PER_NODE="3",
        SLURM_JOB_ID="1",
        SLURM_STEP_ID="0",
        MASTER_PORT=port,
        **SHORT_LEASE,
    )
