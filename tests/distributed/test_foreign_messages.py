"""A stranger who reaches a port of the job, and sends what a careless receiver would run."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.jobs import Launcher, free_port
from torch.distributed import distributed_c10d as c10d

from dpgen.distributed.codec import ForeignMessage, encode
from dpgen.distributed.gloo import torch_world
from dpgen.engine.lockstep import _decode_requests, encode_requests
from dpgen.engine.media.buffers import BufferAddress, MediaBuffer
from dpgen.errors import DpgenError
from dpgen.records import Request, RequestId


class Bomb:
    """Create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.fixture(autouse=True)
def keep_torchs_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_pickler", "_unpickler"):
        monkeypatch.setattr(c10d, name, getattr(c10d, name))


def test_torch_gathers_objects_without_pickle(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    tensor = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    torch_world._replace_pickle()
    with pytest.raises(ForeignMessage, match="a stranger or another version of dpgen"):
        c10d._tensor_to_object(tensor, len(bomb), None)
    assert not (tmp_path / "exploded").exists()
    encoded, size = c10d._object_to_tensor({"rows": [b"x", 1]}, torch.device("cpu"), None)
    assert c10d._tensor_to_object(encoded, int(size), None) == {"rows": [b"x", 1]}


@pytest.mark.parametrize("name", ["_pickler", "_tensor_to_object"])
def test_a_torch_whose_pickle_cannot_be_replaced_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(c10d, name)
    with pytest.raises(DpgenError, match=r"torch \S+ can't gather objects without unpickling .* install torch"):
        torch_world._replace_pickle()


def test_a_torch_that_no_longer_looks_its_pickle_up_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c10d, "_tensor_to_object", lambda tensor, size, group: pickle.load(io.BytesIO()))
    with pytest.raises(DpgenError, match="no _tensor_to_object with _unpickler"):
        torch_world._replace_pickle()


# Rank 1 joins like a rank, and then sends a pickle to each collective of objects.
PROGRAM = """
import os, pickle, sys
from pathlib import Path
from torch.distributed import distributed_c10d as c10d
from dpgen.distributed.codec import ForeignMessage
from dpgen.distributed.gloo import rank_group
from dpgen.distributed.topology import Topology

class Bomb:
    def __reduce__(self):
        return os.mkdir, (sys.argv[3],)

rank, port = int(sys.argv[1]), int(sys.argv[2])
topology = Topology(rank, 2, rank, 2, "node", "torchrun", "127.0.0.1", port)
group = rank_group.GlooGroup(topology)
if rank == 1:
    rank_group.encode = pickle.dumps
    c10d._pickler = pickle.Pickler
for collect in (group.all_gather_object, group.gather_object):
    try:
        collect(Bomb() if rank == 1 else None)
    except ForeignMessage:
        print(collect.__name__, "dropped", flush=True)
group.close()
os._exit(0)
"""


@pytest.mark.multi
@pytest.mark.slow
def test_a_pickle_from_a_peer_is_not_run(launcher: Launcher, tmp_path: Path) -> None:
    target, port = tmp_path / "exploded", str(free_port())
    jobs = [launcher.start([launcher.python, "-c", PROGRAM, str(rank), port, str(target)]) for rank in range(2)]
    assert [job.wait() for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    assert re.findall(r"\w+ dropped", jobs[0].output) == ["all_gather_object dropped", "gather_object dropped"]
    assert not target.exists()


def test_a_request_reaches_the_other_processes_of_an_engine_as_it_is() -> None:
    requests = [Request(RequestId(0), [5]), Request(RequestId(2), None, "text", {"seed": 7}, "math")]
    encoded, _ = encode_requests(requests)
    assert _decode_requests(encode(encoded)) == requests


@pytest.mark.parametrize("shares_memory", [True, False])
def test_prepared_media_reach_the_other_processes_of_an_engine_on_this_host_or_another(shares_memory: bool) -> None:
    buffer = MediaBuffer()
    buffer.write([b"head", b"pixels" * 100])
    in_engine = pickle.loads(pickle.dumps(Request(RequestId(0), [5], media=buffer)))
    encoded, _ = encode_requests([in_engine], shares_memory=shares_memory)
    [received] = _decode_requests(encode(encoded))
    assert [bytes(part) for part in received.media.read()] == [b"head", b"pixels" * 100]
    assert isinstance(received.media, BufferAddress) == shares_memory


@pytest.mark.parametrize(
    ("request_", "error_type"),
    [
        (Request(RequestId(1), [5], None, {"temperature": {1, 2}}), "bad_sampling"),
        (Request(RequestId(1), None, [{"role": "user", "content": {1, 2}}], {}), "unsupported_content"),
    ],
)
def test_a_row_that_cannot_be_sent_to_the_engines_processes_fails_alone(request_: Request, error_type: str) -> None:
    encoded, [rejected] = encode_requests(
        [Request(RequestId(0), [5]), request_, Request(RequestId(2), None, "text", {"seed": 7})]
    )
    assert len(encoded) == 2
    assert rejected.row == 1 and rejected.error is not None and rejected.error.type == error_type
