"""Several hosts: real processes, real connections between network namespaces, and cables that are pulled."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hosts import Hosts, hosts_or_skip
from helpers.jobs import SHORT_LEASE, Job, Launcher, load_result, make_numbered_rows, wait_for

pytestmark = [pytest.mark.multi, pytest.mark.netns]

WriteConfig = Callable[..., str]
SLOW = {"step_s": 0.02, "max_num_seqs": 4}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    yield from hosts_or_skip(3, tmp_path)


def journaled(run_dir: Path) -> int:
    return sum(path.stat().st_size for path in run_dir.glob("journal/*.journal"))


def srun(hosts: Hosts, launcher: Launcher, conf: str, **environment: str) -> list[Job]:
    """A task a host, with the variables that srun sets."""
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
    """One host's torchrun, with a run folder of its own."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.address(0)}:29400", "--rdzv-id", "test"]
    meet += ["--rdzv-conf", "last_call_timeout=10"]  # for more hosts, once there are enough: 30 s by default
    words = [launcher.python, "-m", "torch.distributed.run", *meet, "--local-addr", hosts.address(host), *options]
    return launcher.start(
        hosts.command(host, [*words, "-m", "dpgen", "run", conf, f"run.dir={run_dir}"]), **SHORT_LEASE
    )


@pytest.mark.slow
def test_ranks_that_lose_the_stores_host_end_resumable(
    hosts: Hosts, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), engine=SLOW)
    jobs = srun(hosts, launcher, conf)  # with real leases
    wait_for(lambda: journaled(tmp_path / "run") > 3000)
    hosts.disconnect(0)
    # It would go on without the others when they end, and for longer the busier this machine is.
    os.kill(jobs[0].process.pid, signal.SIGSTOP)
    assert [job.wait(150) for job in jobs[1:]] == [75, 75], jobs[1].output
    assert "lost rank 0, which keeps the store" in jobs[1].output
    jobs[0].end()
    verdict = launcher.dpgen("verify", str(tmp_path / "run"), "--json")
    assert verdict.wait() == 1
    facts = json.loads(verdict.output)
    assert 0 < facts["num_done"] < 3000 and not facts["doubled"] and not facts["problems"]


@pytest.mark.slow
def test_the_others_go_on_without_a_host_that_was_cut_off(
    hosts: Hosts, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    jobs = srun(hosts, launcher, write_config(make_numbered_rows(600), engine=SLOW), **SHORT_LEASE)
    wait_for(lambda: journaled(tmp_path / "run") > 3000)
    hosts.disconnect(2)
    assert [job.wait(200) for job in jobs[:2]] == [0, 0], jobs[0].output
    assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(600))


@pytest.mark.slow
def test_hosts_without_a_shared_folder_bring_their_rows_to_rank_0(
    hosts: Hosts, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), output={"gather_bytes": 65536})
    options = ["--nnodes", "3", "--nproc-per-node", "1"]
    jobs = [
        torchrun(hosts, launcher, conf, host, *options, run_dir=tmp_path / f"on{host}") for host in range(hosts.number)
    ]
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    [first] = [tmp_path / f"on{host}" for host in range(hosts.number) if (tmp_path / f"on{host}" / "_SUCCESS").exists()]
    assert [row["row_id"] for row in load_result(first)] == list(range(3000))
    facts = json.loads((first / "run.json").read_text())
    assert facts["gather_rounds"] > 1
    assert sorted(each["node"] for each in facts["manifests"]) == ["host0", "host1", "host2"]


@pytest.mark.slow
def test_torchrun_goes_on_with_the_hosts_that_are_left_though_they_share_no_folder(
    hosts: Hosts, launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(600), engine=SLOW)
    options = ["--nnodes", "1:3", "--nproc-per-node", "1", "--max-restarts", "3"]
    run_dirs = [tmp_path / f"on{host}" for host in range(hosts.number)]
    jobs = [torchrun(hosts, launcher, conf, host, *options, run_dir=run_dirs[host]) for host in range(hosts.number)]
    wait_for(lambda: all(journaled(run_dir) > 1000 for run_dir in run_dirs), 120)
    hosts.disconnect(2)
    assert jobs[0].wait(300) == 0, jobs[0].output
    [home] = [run_dir for run_dir in run_dirs if (run_dir / "_SUCCESS").exists()]
    assert [row["row_id"] for row in load_result(home)] == list(range(600))
    facts = json.loads((home / "run.json").read_text())
    assert facts["attempt"] > 1 and facts["dp_size"] == 2, "what host 2 had done is done again by the others"
