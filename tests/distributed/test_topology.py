"""Launchers' environments and the arithmetic that follows from them."""

from __future__ import annotations

import pytest

from dpgen.distributed.ports import derive_job_ports
from dpgen.distributed.topology import (
    Topology,
    assign_cores,
    assign_gpus,
    expand_tasks_per_node,
    fill_local_rank,
    first_host,
    read_topology,
)
from dpgen.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURMD_NODENAME": "gpu08",
}


def test_torchrun() -> None:
    found = read_topology(TORCHRUN)
    assert (found.dp_rank, found.dp_size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    assert (found.master_addr, found.master_port, found.restart) == ("node0", 29500, 2)
    assert found.launcher == "torchrun"


def test_srun() -> None:
    found = read_topology(SRUN)
    assert (found.dp_rank, found.dp_size, found.local_rank, found.local_size) == (3, 4, 1, 2)
    assert (found.master_addr, found.node, found.launcher) == ("gpu07", "gpu08", "slurm")
    first = read_topology({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (first.discovery_ports, first.job) == (found.discovery_ports, found.job), "every task derives the same"
    assert found.discovery_ports == derive_job_ports(77, 0) and found.master_port == 0
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        assert read_topology({**SRUN, name: "5"}).job != found.job


def test_a_port_that_is_given_is_the_only_one() -> None:
    found = read_topology({**SRUN, "MASTER_PORT": "29500"})
    assert (found.master_port, found.discovery_ports) == (29500, ())
    assert read_topology(TORCHRUN).discovery_ports == ()


@pytest.mark.parametrize("job", [0, 1, 77, 2**32 - 2])
def test_a_jobs_ports_are_its_own_and_no_connections(job: int) -> None:
    ports = derive_job_ports(job, 0)
    assert ports == derive_job_ports(job, 0) and len(set(ports)) == 8
    assert all(15_000 <= port < 30_000 for port in ports), "kernels hand out 32768 and up"
    for neighbour in (derive_job_ports(job, 1), derive_job_ports(job + 1, 0)):
        assert not set(neighbour) & set(ports)


def test_a_wrapper_that_tells_no_local_rank_is_placed_by_the_nodes_of_all() -> None:
    bare = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    found = fill_local_rank(read_topology({**bare, "LOCAL_RANK": "1"}), ["a"] * 4 + ["b"] * 4)
    assert (found.dp_rank, found.local_rank, found.local_size) == (5, 1, 4)
    assert assign_gpus(found, ["0", "1", "2", "3"], 1) == ["1"]
    assert assign_gpus(found, ["3"], 1) == ["3"], "one that the wrapper has bound already"


def test_torchrun_inside_srun_is_torchruns() -> None:
    assert read_topology({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_a_batch_script_without_srun_is_one_process() -> None:
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77"}
    assert read_topology(script).dp_size == 1


def test_nothing_is_a_world_of_one() -> None:
    found = read_topology({})
    assert (found.dp_rank, found.dp_size, found.is_rank_0) == (0, 1, True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
    ],
)
def test_a_broken_environment_is_refused(changed: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_topology({**TORCHRUN, **changed})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n0", "n0"), ("gpu[03-07,12],login1", "gpu03"), ("a1,a2", "a1"), ("rack1-n[5,7]", "rack1-n5"), ("", "")],
)
def test_first_host_of_a_slurm_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_tasks_per_node() -> None:
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="tasks per node"):
        expand_tasks_per_node("many")


def local(rank: int, size: int, launcher: str = "torchrun") -> Topology:
    return Topology(rank, size, rank, size, node="n", launcher=launcher)


def test_gpus_are_shared_out_without_overlap_also_from_a_subset() -> None:
    visible = ["2", "3", "6", "7"]
    assert [assign_gpus(local(rank, 2), visible, 2) for rank in range(2)] == [["2", "3"], ["6", "7"]]
    assert [assign_gpus(local(rank, 4), visible, 1) for rank in range(4)] == [["2"], ["3"], ["6"], ["7"]]


def test_gpus_that_slurm_bound_to_a_task_are_its_own() -> None:
    assert assign_gpus(local(1, 4, "slurm"), ["GPU-abc"], 1) == ["GPU-abc"]


def test_too_few_gpus_names_the_right_number_of_ranks() -> None:
    with pytest.raises(ConfigError, match=r"4 ranks on n: 8 GPUs needed, 4 visible; start 2"):
        assign_gpus(local(0, 4), ["0", "1", "2", "3"], 2)
    with pytest.raises(ConfigError, match="one rank needs 4"):
        assign_gpus(local(0, 1), ["0"], 4)


def test_gpus_can_be_shared_on_purpose() -> None:
    assert [assign_gpus(local(rank, 3), ["0", "1"], 1, share=True) for rank in range(3)] == [["0"], ["1"], ["0"]]


def test_cores_are_divided_unless_the_launcher_has_bound_them() -> None:
    whole = frozenset(range(8))
    assert [assign_cores([whole] * 3, rank) for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert assign_cores([frozenset({0, 1}), frozenset({2, 3})], 1) == [2, 3]
    assert [assign_cores([frozenset({0, 1})] * 3, rank) for rank in range(3)] == [[0], [1], [0]]
