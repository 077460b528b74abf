"""Several hosts: real processes, real connections between network namespaces, and hosts that are cut off."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hosts import Hosts, hosts_or_skip
from helpers.jobs import SHORT_LEASE, Job, Launcher, WriteConfig, make_numbered_rows, wait_for
from helpers.results import count_journal_bytes, load_all_rows

pytestmark = [pytest.mark.multi, pytest.mark.netns]

SLOW = {"step_s": 0.02, "max_num_seqs": 4}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    yield from hosts_or_skip(3, tmp_path)


def srun(hosts: Hosts, launcher: Launcher, conf: str, **environment: str) -> list[Job]:
    """Start one task on each host, with the variables that srun sets."""
    words = [launcher.python, "-m", "dpgen", "run", conf]
    names = ",".join(hosts.address(host) for host in range(hosts.number))
    return [
        launcher.start(
            hosts.command(host, words, own_name_is_loopback=True),
            SLURM_PROCID=str(host),
            SLURM_LOCALID="0",
            SLURM_STEP_NUM_TASKS=str(hosts.number),
            SLURM_STEP_NODELIST=names,
            SLURM_STEP_TASKS_PER_NODE=f"1(x{hosts.number})",
            SLURMD_NODENAME=f"host{host}",
            SLURM_JOB_ID="7",
            SLURM_STEP_ID="0",
            MASTER_ADDR=hosts.address(0),
            **environment,
        )
        for host in range(hosts.number)
    ]


def torchrun(hosts: Hosts, launcher: Launcher, conf: str, host: int, *options: str, run_dir: Path) -> Job:
    """Start the torchrun of one host, with a run directory of its own."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.address(0)}:29400", "--rdzv-id", "test"]
    rendezvous += ["--rdzv-conf", "last_call_timeout=10"]  # once enough hosts have joined: 30 s by default
    words = [launcher.python, "-m", "torch.distributed.run", *rendezvous, "--local-addr", hosts.address(host), *options]
    return launcher.start(
        hosts.command(host, [*words, "-m", "dpgen", "run", conf, f"run.dir={run_dir}"]), **SHORT_LEASE
    )


@pytest.mark.slow
def test_ranks_that_lose_the_stores_host_end_resumable(
    hosts: Hosts, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), engine=SLOW)
    jobs = srun(hosts, launcher, conf)  # with the real lease of 60 s
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 3000)
    hosts.disconnect(0)
    # Otherwise rank 0 would continue without the others when they end, for longer on a busier machine.
    os.kill(jobs[0].process.pid, signal.SIGSTOP)
    assert [job.wait(150) for job in jobs[1:]] == [75, 75], jobs[1].output
    assert "lost rank 0, which keeps the store" in jobs[1].output
    jobs[0].end()
    verify = launcher.dpgen("verify", str(tmp_path / "run"), "--json")
    assert verify.wait() == 1
    report = json.loads(verify.output)
    assert 0 < report["num_done"] < 3000 and not report["doubled"] and not report["problems"]


@pytest.mark.slow
def test_the_other_ranks_continue_without_a_host_that_was_cut_off(
    hosts: Hosts, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    jobs = srun(hosts, launcher, write_config(make_numbered_rows(600), engine=SLOW), **SHORT_LEASE)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 3000)
    hosts.disconnect(2)
    assert [job.wait(200) for job in jobs[:2]] == [0, 0], jobs[0].output
    load_all_rows(tmp_path / "run", 600)


@pytest.mark.slow
def test_rows_of_hosts_without_a_shared_run_directory_are_gathered_to_rank_0(
    hosts: Hosts, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), output={"gather_bytes": 65536})
    options = ["--nnodes", "3", "--nproc-per-node", "1"]
    jobs = [
        torchrun(hosts, launcher, conf, host, *options, run_dir=tmp_path / f"on{host}") for host in range(hosts.number)
    ]
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    [first] = [tmp_path / f"on{host}" for host in range(hosts.number) if (tmp_path / f"on{host}" / "_SUCCESS").exists()]
    load_all_rows(first, 3000)
    metadata = json.loads((first / "run.json").read_text())
    assert metadata["gather_rounds"] > 1
    assert sorted(manifest["node"] for manifest in metadata["manifests"]) == ["host0", "host1", "host2"]


@pytest.mark.slow
def test_torchrun_continues_with_the_remaining_hosts_though_they_share_no_run_directory(
    hosts: Hosts, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(600), engine=SLOW)
    options = ["--nnodes", "1:3", "--nproc-per-node", "1", "--max-restarts", "3"]
    run_dirs = [tmp_path / f"on{host}" for host in range(hosts.number)]
    jobs = [torchrun(hosts, launcher, conf, host, *options, run_dir=run_dirs[host]) for host in range(hosts.number)]
    wait_for(lambda: all(count_journal_bytes(run_dir) > 1000 for run_dir in run_dirs), 120)
    hosts.disconnect(2)
    assert jobs[0].wait(300) == 0, jobs[0].output
    [home] = [run_dir for run_dir in run_dirs if (run_dir / "_SUCCESS").exists()]
    load_all_rows(home, 600)
    metadata = json.loads((home / "run.json").read_text())
    assert metadata["attempt"] > 1 and metadata["dp_size"] == 2, "the others generate the rows of host 2 again"
