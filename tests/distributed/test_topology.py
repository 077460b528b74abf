"""Launchers' environments and the arithmetic that follows from them."""

from __future__ import annotations

import pytest

from dpgen.distributed.devices import assign_cores, assign_gpus, count_sharing_ranks
from dpgen.distributed.ports import derive_job_ports
from dpgen.distributed.topology import (
    Topology,
    expand_tasks_per_node,
    fill_local_rank,
    first_host,
    name_nodes,
    read_boot_id,
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


def test_torchruns_variables_are_read() -> None:
    topology = read_topology(TORCHRUN)
    assert (topology.dp_rank, topology.dp_size, topology.local_rank, topology.local_size) == (5, 8, 1, 4)
    assert (topology.master_addr, topology.master_port, topology.restart) == ("node0", 29500, 2)
    assert topology.launcher == "torchrun"


def test_sruns_variables_are_read_and_all_tasks_derive_the_same_ports_and_job() -> None:
    topology = read_topology(SRUN)
    assert (topology.dp_rank, topology.dp_size, topology.local_rank, topology.local_size) == (3, 4, 1, 2)
    assert (topology.master_addr, topology.node, topology.launcher) == ("gpu07", "gpu08", "slurm")
    first = read_topology({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert (first.discovery_ports, first.job) == (topology.discovery_ports, topology.job)
    assert topology.discovery_ports == derive_job_ports(77, 0) and topology.master_port == 0
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        assert read_topology({**SRUN, name: "5"}).job != topology.job


def test_a_given_port_is_the_only_one() -> None:
    topology = read_topology({**SRUN, "MASTER_PORT": "29500"})
    assert (topology.master_port, topology.discovery_ports) == (29500, ())
    assert read_topology(TORCHRUN).discovery_ports == ()


@pytest.mark.parametrize("job", [0, 1, 77, 2**32 - 2])
def test_the_ports_of_a_job_differ_from_its_neighbours_and_from_outgoing_connections(job: int) -> None:
    ports = derive_job_ports(job, 0)
    assert ports == derive_job_ports(job, 0) and len(set(ports)) == 8
    assert all(15_000 <= port < 30_000 for port in ports), "kernels assign outgoing connections from 32768 on"
    for neighbour in (derive_job_ports(job, 1), derive_job_ports(job + 1, 0)):
        assert not set(neighbour) & set(ports)


def test_without_a_local_rank_from_the_launcher_it_follows_from_all_ranks_nodes() -> None:
    bare = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    topology = fill_local_rank(read_topology({**bare, "LOCAL_RANK": "1"}), ["a"] * 4 + ["b"] * 4, [(0, "")] * 8)
    assert (topology.dp_rank, topology.local_rank, topology.local_size) == (5, 1, 4)
    assert assign_gpus(topology, ["0", "1", "2", "3"], 1) == ["1"]
    assert assign_gpus(topology, ["3"], 1) == ["3"], "the wrapper has bound this GPU to the rank"


def test_ranks_to_which_torchrun_gives_virtual_local_ranks_have_a_gpu_and_cores_each() -> None:
    """`torchrun --virtual-local-rank` gives all ranks of a node LOCAL_RANK=0, and each another GPU."""
    nodes, given = ["a"] * 4 + ["b"] * 4, [(0, str(rank % 4)) for rank in range(8)]
    topology = fill_local_rank(read_topology({**TORCHRUN, "LOCAL_RANK": "0"}), nodes, given)
    assert (topology.dp_rank, topology.local_rank, topology.local_size) == (5, 1, 4)
    assert assign_gpus(topology, ["1"], 1) == ["1"] and count_sharing_ranks(topology, 1, 1) == 1
    assert assign_cores([frozenset(range(8))] * 4, topology.local_rank) == [2, 3]
    with pytest.raises(ConfigError, match=r"8 GPUs needed for 4 ranks on .*, 1 visible: one rank needs 2"):
        assign_gpus(topology, ["1"], 2)


def test_ranks_of_torchrun_with_the_same_gpu_are_too_many_for_it() -> None:
    nodes, given = ["a"] * 4 + ["b"] * 4, [(rank % 4, "0") for rank in range(8)]
    topology = fill_local_rank(read_topology(TORCHRUN), nodes, given)
    with pytest.raises(ConfigError, match=r"4 GPUs needed for 4 ranks on .*, 1 visible"):
        assign_gpus(topology, ["0"], 1)


def test_torchruns_variables_take_precedence_over_sruns() -> None:
    assert read_topology({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_a_batch_script_without_srun_is_one_process() -> None:
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77"}
    assert read_topology(script).dp_size == 1


OMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environ",
    [
        OMPI,
        {name.replace("OMPI", "MV2"): value for name, value in OMPI.items()},
        {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
        {**OMPI, "PMIX_RANK": "5"},
        {**OMPI, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},  # mpirun starts a daemon on each node by srun
    ],
    ids=["Open MPI", "MVAPICH2", "MPICH", "PMIx", "under srun"],
)
def test_the_ranks_of_mpirun_are_one_world(environ: dict[str, str]) -> None:
    topology = read_topology({**environ, **MASTER})
    assert (topology.dp_rank, topology.dp_size, topology.local_rank, topology.local_size) == (5, 8, 1, 4)
    assert (topology.launcher, topology.master_addr, topology.master_port) == ("mpi", "node0", 29500)
    with pytest.raises(ConfigError, match=r"_SIZE=8 gives 8 ranks, but MASTER_ADDR is not set.*torchrun or srun"):
        read_topology(environ)


def test_on_one_machine_the_ranks_of_open_mpi_need_no_address() -> None:
    alone = {**OMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "5", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    topology = read_topology({**alone, "PMIX_NAMESPACE": "prterun-node0-77@1"})
    assert topology.master_addr == "127.0.0.1" and len(topology.discovery_ports) == 8
    assert read_topology({**alone, "PMIX_NAMESPACE": "prterun-node0-78@1"}).job != topology.job
    with pytest.raises(ConfigError, match="MASTER_PORT is not set"):
        read_topology(alone)
    assert read_topology({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}).dp_size == 1


def test_pmis_variables_that_srun_sets_itself_change_nothing() -> None:
    for extra in ({"PMI_RANK": "3", "PMI_SIZE": "4"}, {"PMIX_RANK": "3"}):
        assert read_topology({**SRUN, **extra}) == read_topology(SRUN)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set, but WORLD_SIZE is not: .*unset RANK for a single process"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but RANK is not"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK=1 is set, but OMPI_COMM_WORLD_SIZE is not"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1 is set, but PMIX_SIZE is not"),
        ({"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2", **MASTER}, "OMPI_COMM_WORLD_RANK='x'"),
        ({"PMI_RANK": "2", "PMI_SIZE": "2", **MASTER}, r"rank 2 of 2: .*\(PMI_RANK=2, PMI_SIZE=2, MASTER_ADDR=node0"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT=0: must be from 1 to 65535"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be from 1 to 65535"),
        ({**SRUN, "MASTER_PORT": "-1"}, "MASTER_PORT=-1: must be from 1 to 65535"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1 contradicts SLURM_STEP_NUM_TASKS=4. Unset RANK and"),
        ({**OMPI, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1 contradicts OMPI_COMM_WORLD_SIZE=8"),
        (
            {**SRUN, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
            "OMPI_COMM_WORLD_SIZE=1 contradicts SLURM_STEP_NUM_TASKS=4",
        ),
        ({**SRUN, "SLURM_NODEID": "2"}, r"SLURM_NODEID=2 .* but SLURM_STEP_TASKS_PER_NODE=2\(x2\) is for 2 nodes"),
        ({**SRUN, "SLURM_NODEID": "-1"}, "SLURM_NODEID=-1"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": ""}, "SLURM_NODEID=1 .* SLURM_STEP_TASKS_PER_NODE is not set"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two': must be"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x1000000000)"}, r"SLURM_STEP_TASKS_PER_NODE='2\(x1000000000\)'"),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "9(x2)"},
            r"9 ranks on this node, of 4 in all: .*NODE=9\(x2\)",
        ),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "9 ranks on this node, of 8 in all: .*LOCAL_WORLD_SIZE=9"),
        ({**SRUN, "SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID='12_3': must be an integer"),
        ({"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "3"}, "JSM_NAMESPACE_SIZE=3 gives 3 ranks, but MASTER_ADDR"),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "3"}, "HOROVOD_SIZE=3 gives 3 ranks, but MASTER_ADDR"),
        *(
            ({**launcher, "MASTER_ADDR": address}, "MASTER_ADDR=.*: must be the name or address of rank 0's host alone")
            for launcher in (TORCHRUN, SRUN, OMPI)
            for address in ("n1:29500", "tcp://n1", "n[1-2]", "n1,n2", "n1 n2", "$(hostname)", "0.0.0.0", "::", "[::]")
        ),
        ({**SRUN, "SLURM_LOCALID": "2"}, r"local rank 2 of 2: .*SLURM_LOCALID=2, SLURM_STEP_TASKS_PER_NODE=2\(x2\)"),
    ],
)
def test_variables_that_contradict_each_other_are_rejected_by_their_names(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_topology(environ)


def test_blank_variables_and_a_world_size_of_one_alone_are_no_world() -> None:
    for environ in ({"RANK": "", "WORLD_SIZE": " "}, {"WORLD_SIZE": "1"}, {**SRUN, "SLURM_PROCID": ""}):
        assert read_topology(environ).dp_size == 1


def test_one_torchrun_on_each_node_may_be_started_by_srun_or_mpirun() -> None:
    torchrun = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_topology({**SRUN, **OMPI, **torchrun, "TORCHELASTIC_RUN_ID": "none"}).dp_size == 1


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (" node0 ", "node0"),
        ("[::1]", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("10.0.0.1", "10.0.0.1"),
        ("a_b", "a_b"),
    ],
)
def test_an_address_may_have_blanks_around_it_or_brackets(text: str, address: str) -> None:
    for launcher in (TORCHRUN, SRUN):
        assert read_topology({**launcher, "MASTER_ADDR": text}).master_addr == address


def test_an_empty_environment_is_a_world_of_one() -> None:
    topology = read_topology({})
    assert (topology.dp_rank, topology.dp_size, topology.is_rank_0) == (0, 1, True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': must be an integer"),
        ({"RANK": "8"}, "rank 8 of 8: must be at least 0 and below 8"),
        ({"RANK": "1_0"}, "RANK='1_0': must be an integer"),
        ({"RANK": "１"}, "RANK='１': must be an integer"),
        ({"RANK": "9" * 30}, "RANK='9+': must be an integer"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
    ],
)
def test_a_broken_environment_is_rejected(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_topology({**TORCHRUN, **changed})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("", ""),
        ("n0", "n0"),
        ("a1,a2", "a1"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
        ("gpu[03-07,12],login1", "gpu03"),
        ("n[007-010]", "n007"),
        ("rack1-n[5,7]", "rack1-n5"),
        ("rack[0-1]node[0-3]", "rack0node0"),
        ("a[2,1]b[7,9]c,x", "a2b7c"),
        ("n[0-3]-ib,login1", "n0-ib"),
        ("b[5],a[1-2]", "b5"),
    ],
)
def test_the_first_host_of_a_slurm_list_is_expanded_in_slurms_order(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_slurms_tasks_per_node_are_expanded() -> None:
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE='many': must be SLURM's tasks per node"):
        expand_tasks_per_node("many")


def local(rank: int, size: int, launcher: str = "torchrun") -> Topology:
    return Topology(rank, size, rank, size, node="n", launcher=launcher)


def test_ranks_divide_the_visible_gpus_without_overlap() -> None:
    visible = ["2", "3", "6", "7"]
    assert [assign_gpus(local(rank, 2), visible, 2) for rank in range(2)] == [["2", "3"], ["6", "7"]]
    assert [assign_gpus(local(rank, 4), visible, 1) for rank in range(4)] == [["2"], ["3"], ["6"], ["7"]]


def test_a_task_keeps_the_gpus_that_slurm_bound_to_it() -> None:
    assert assign_gpus(local(1, 4, "slurm"), ["GPU-abc"], 1) == ["GPU-abc"]


def test_with_too_few_gpus_the_error_gives_the_number_of_ranks_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"8 GPUs needed for 4 ranks on n, 4 visible: start 2 ranks"):
        assign_gpus(local(0, 4), ["0", "1", "2", "3"], 2)
    with pytest.raises(ConfigError, match="one rank needs 4"):
        assign_gpus(local(0, 1), ["0"], 4)


def test_ranks_share_gpus_only_if_asked_to() -> None:
    assert [assign_gpus(local(rank, 3), ["0", "1"], 1, share=True) for rank in range(3)] == [["0"], ["1"], ["0"]]
    assert [count_sharing_ranks(local(rank, 3), 2, 1) for rank in range(3)] == [2, 1, 2]


def test_no_rank_shares_gpus_where_there_are_enough_or_the_launcher_has_bound_them() -> None:
    assert [count_sharing_ranks(local(rank, 2), 4, 2) for rank in range(2)] == [1, 1]
    assert count_sharing_ranks(local(1, 4, "slurm"), 1, 1) == 1


def test_ranks_divide_their_cores_unless_the_launcher_has_bound_them() -> None:
    all_cores = frozenset(range(8))
    assert [assign_cores([all_cores] * 3, rank) for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert assign_cores([frozenset({0, 1}), frozenset({2, 3})], 1) == [2, 3]
    assert [assign_cores([frozenset({0, 1})] * 3, rank) for rank in range(3)] == [[0], [1], [0]]


def test_two_machines_of_one_name_are_two_nodes_and_shown_by_that_name() -> None:
    machines = [("worker", "a"), ("worker", "a"), ("worker", "b"), ("login", "c"), ("worker", "b")]
    assert name_nodes(machines) == ["worker", "worker", "worker (2)", "login", "worker (2)"]


def test_this_machine_has_one_boot_id() -> None:
    assert read_boot_id() == read_boot_id() != ""
