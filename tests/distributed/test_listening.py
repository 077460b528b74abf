"""Where ranks listen: on loopback if the launcher puts all of them on one node."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from dpgen.distributed.gloo import torch_world
from dpgen.distributed.network import LOOPBACK
from dpgen.distributed.ports import derive_job_ports
from dpgen.distributed.store_discovery import StoreAdvertiser
from dpgen.distributed.topology import Topology, read_topology
from dpgen.engine.starting.server_process import build_engine_env


def list_listeners(port: int) -> set[str]:
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


@pytest.mark.parametrize(("host", "is_closed"), [(LOOPBACK, True), ("localhost", False)])
def test_the_store_of_one_node_listens_on_loopback(host: str, is_closed: bool) -> None:
    store = torch_world.open_store((host, 0), num_ranks=1, is_host=True, connect_s=60, answer_s=60)
    store.set("key", "value")
    assert store.get("key") == b"value"
    assert (list_listeners(store.port) == {"127.0.0.1"}) == is_closed


def test_a_port_that_is_taken_is_an_error_of_the_store() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        with pytest.raises(OSError, match="Address already in use"):
            torch_world.open_store(taken.getsockname(), num_ranks=1, is_host=True, connect_s=60, answer_s=60)


def test_the_advertiser_of_one_node_listens_on_loopback() -> None:
    ports = derive_job_ports(os.getpid(), 3)
    with StoreAdvertiser(ports, "job", 5, LOOPBACK) as closed, StoreAdvertiser(ports, "job", 5) as open_:
        assert list_listeners(closed.port) == {"127.0.0.1"}
        assert list_listeners(open_.port) in ({"::"}, {"0.0.0.0"})


SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[1-2]"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4"}, True),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, False),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, False),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, True),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu1", "MASTER_PORT": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, True),
    ],
)
def test_ranks_need_no_door_to_other_machines_if_the_launcher_puts_all_on_one(
    environment: dict[str, str], expected: bool
) -> None:
    topology: Topology = read_topology(environment)
    assert topology.is_on_one_node is expected


@pytest.mark.parametrize("is_on_one_node", [True, False])
def test_an_engine_within_one_node_connects_over_loopback(is_on_one_node: bool) -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth0"}  # by which this rank reaches ranks on other nodes
    env = build_engine_env(environ, gpus=["0"], num_cores=0, log_level="info", is_on_one_node=is_on_one_node)
    assert env["GLOO_SOCKET_IFNAME"] == ("lo" if is_on_one_node else "eth0")
    assert env.get("NCCL_SOCKET_IFNAME") == ("lo" if is_on_one_node else None)
    environ["NCCL_SOCKET_IFNAME"] = "eth1"
    env = build_engine_env(environ, gpus=["0"], num_cores=0, log_level="info", is_on_one_node=is_on_one_node)
    assert env["NCCL_SOCKET_IFNAME"] == "eth1", "the user's own choice stays"
