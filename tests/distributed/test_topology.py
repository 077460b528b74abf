"""Launchers' environments and the arithmetic that follows from them."""

from __future__ import annotations

import pytest

from dpgen.distributed.ports import ports_of_job
from dpgen.distributed.topology import (
    Topology,
    cores_of_rank,
    expand_tasks_per_node,
    first_host,
    from_environment,
    gpus_of_rank,
    place_on_node,
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
    found = from_environment(TORCHRUN)
    assert (found.dp_rank, found.dp_size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    assert (found.master_addr, found.master_port, found.restart) == ("node0", 29500, 2)
    assert found.launcher == "torchrun"


def test_srun() -> None:
    found = from_environment(SRUN)
    assert (found.dp_rank, found.dp_size, found.local_rank, found.local_size) == (3, 4, 1, 2)
    assert (found.master_addr, found.node, found.launcher) == ("gpu07", "gpu08", "slurm")
    first = from_environment({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (first.beacon_ports, first.job) == (found.beacon_ports, found.job), "every task derives the same"
    assert found.beacon_ports == ports_of_job(77, 0) and found.master_port == 0
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        assert from_environment({**SRUN, name: "5"}).job != found.job


def test_a_port_that_is_given_is_the_only_one() -> None:
    found = from_environment({**SRUN, "MASTER_PORT": "29500"})
    assert (found.master_port, found.beacon_ports) == (29500, ())
    assert from_environment(TORCHRUN).beacon_ports == ()


@pytest.mark.parametrize("job", [0, 1, 77, 2**32 - 2])
def test_a_jobs_ports_are_its_own_and_no_connections(job: int) -> None:
    ports = ports_of_job(job, 0)
    assert ports == ports_of_job(job, 0) and len(set(ports)) == 8
    assert all(15_000 <= port < 30_000 for port in ports), "kernels hand out 32768 and up"
    for neighbour in (ports_of_job(job, 1), ports_of_job(job + 1, 0)):
        assert not set(neighbour) & set(ports)


def test_a_wrapper_that_tells_no_local_rank_is_placed_by_the_nodes_of_all() -> None:
    bare = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    found = place_on_node(from_environment({**bare, "LOCAL_RANK": "1"}), ["a"] * 4 + ["b"] * 4)
    assert (found.dp_rank, found.local_rank, found.local_size) == (5, 1, 4)
    assert gpus_of_rank(found, ["0", "1", "2", "3"], 1) == ["1"]
    assert gpus_of_rank(found, ["3"], 1) == ["3"], "one that the wrapper has bound already"


def test_torchrun_inside_srun_is_torchruns() -> None:
    assert from_environment({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_a_batch_script_without_srun_is_one_process() -> None:
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77"}
    assert from_environment(script).dp_size == 1


def test_nothing_is_a_world_of_one() -> None:
    found = from_environment({})
    assert (found.dp_rank, found.dp_size, found.is_first) == (0, 1, True)


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
        from_environment({**TORCHRUN, **changed})


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
    assert [gpus_of_rank(local(rank, 2), visible, 2) for rank in range(2)] == [["2", "3"], ["6", "7"]]
    assert [gpus_of_rank(local(rank, 4), visible, 1) for rank in range(4)] == [["2"], ["3"], ["6"], ["7"]]


def test_gpus_that_slurm_bound_to_a_task_are_its_own() -> None:
    assert gpus_of_rank(local(1, 4, "slurm"), ["GPU-abc"], 1) == ["GPU-abc"]


def test_too_few_gpus_names_the_right_number_of_ranks() -> None:
    with pytest.raises(ConfigError, match=r"4 ranks on n: 8 GPUs needed, 4 visible; start 2"):
        gpus_of_rank(local(0, 4), ["0", "1", "2", "3"], 2)
    with pytest.raises(ConfigError, match="one rank needs 4"):
        gpus_of_rank(local(0, 1), ["0"], 4)


def test_gpus_can_be_shared_on_purpose() -> None:
    assert [gpus_of_rank(local(rank, 3), ["0", "1"], 1, share=True) for rank in range(3)] == [["0"], ["1"], ["0"]]


def test_cores_are_divided_unless_the_launcher_has_bound_them() -> None:
    whole = frozenset(range(8))
    assert [cores_of_rank([whole] * 3, rank) for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert cores_of_rank([frozenset({0, 1}), frozenset({2, 3})], 1) == [2, 3]
    assert [cores_of_rank([frozenset({0, 1})] * 3, rank) for rank in range(3)] == [[0], [1], [0]]
