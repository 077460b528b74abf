"""Keep engine processes in lockstep: every process of a group takes the same requests before the same step.

- vLLM's external launcher runs one scheduler in each process, and relies on all of them seeing the same requests in
  the same order. The group's leader receives the requests from its rank, and broadcasts them between two steps.
- With mixtures of experts all groups step together. A group without work makes dummy steps; vLLM's own
  `has_unfinished_requests` agrees on that over all groups.
- No process ends alone: all leave in the round in which each was asked to shut down.
- Requests travel as `dpgen.distributed.codec` encodes them, not through torch's collectives of objects, which pickle.
  vLLM's own collectives in the same process do pickle, so dpgen can't replace pickle for all of torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dpgen.distributed.codec import decode, encode
from dpgen.distributed.gloo.torch_world import open_store
from dpgen.distributed.layout import EngineWorld
from dpgen.engine.media.buffers import BufferAddress, CopiedBuffer
from dpgen.errors import RowRefused
from dpgen.records import PoolingRequest, Request, RequestId, RowResult, make_rejected_result

_NO_TIMEOUT = timedelta(days=20)  # the longest that gloo takes; the ranks notice a lost process, and end this one


def host_store_on_loopback(world: EngineWorld) -> Any:
    """Return the store of a world on one node, listening on loopback; None where another process or torch opens it.

    torch itself, which vLLM asks for a store, listens on every address. If the store is there already in this
    process, torch takes it.
    """
    if world.rank > 0 or not world.is_on_one_node:
        return None
    address, limit_s = (world.address, world.port), _NO_TIMEOUT.total_seconds()
    return open_store(address, num_ranks=None, is_host=True, connect_s=limit_s, answer_s=limit_s)


def encode_requests(requests: Iterable[Request], *, shares_memory: bool = True) -> tuple[list[bytes], list[RowResult]]:
    """Return the requests as bytes for the other processes, and the results of rows that can't be sent to them.

    Args:
        shares_memory: the other processes are on this host; else prepared media are copied into the bytes.
    """
    encoded, rejected = [], []
    for request in requests:
        error_type = "bad_sampling"
        try:
            sampling = encode(request.sampling)
            error_type = "unsupported_content"
            content = [list(request.id), request.prompt_token_ids, request.prompt, sampling, request.adapter]
            pooling = None if request.pooling is None else dataclasses.asdict(request.pooling)
            media = _encode_media(request.media, shares_memory=shares_memory)
            encoded.append(encode([*content, request.num_completion_tokens, pooling, media]))
        except TypeError as error:
            rejected.append(make_rejected_result(request.id, RowRefused(error_type, str(error))))
    return encoded, rejected


class LockstepGroup:
    """Connect the processes of one engine world. Collective: all create it at the same point.

    Args:
        world: this process's place in it. torch.distributed is initialised from the environment, unless it is already.
    """

    def __init__(self, world: EngineWorld) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method="env://", timeout=_NO_TIMEOUT)
        self._world = world
        self._group = world.rank // world.group_size
        self._leader = self._group * world.group_size
        self._all = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT)
        # torch.distributed wants every process to create every group.
        leaders = range(0, world.size, world.group_size)
        groups = [
            dist.new_group(list(range(leader, leader + world.group_size)), timeout=_NO_TIMEOUT, backend="gloo")
            for leader in leaders
        ]
        self._own_group: Any = groups[self._group]

    @property
    def is_leader(self) -> bool:
        """True for the process that receives its group's requests and reports its results."""
        return self._world.is_leader

    @property
    def shares_memory(self) -> bool:
        """True if the processes of this one's group are on this host."""
        return self._world.group_size == 1 or self._world.is_on_one_node

    def exchange(self, requests: Sequence[bytes], stop_requested: bool) -> tuple[list[Request], bool]:
        """Exchange one round's requests. Collective.

        Args:
            requests: new requests, from `encode_requests`; only the leader has any.

        Returns:
            the leader's requests, and True if every process was asked to shut down.
        """
        message = encode(requests) if requests else b""
        # Sums: processes not asked to shut down, then for each group the bytes of its leader's message.
        sums = torch.zeros(1 + self._world.num_groups, dtype=torch.int64)
        sums[0] = not stop_requested
        sums[1 + self._group] = len(message)
        dist.all_reduce(sums, group=self._all)
        num_bytes = int(sums[1 + self._group])
        if num_bytes and self._world.group_size > 1:
            buffer = torch.frombuffer(bytearray(message or num_bytes), dtype=torch.uint8)
            dist.broadcast(buffer, src=self._leader, group=self._own_group)
            message = buffer.numpy().tobytes()
        return _decode_requests(message), not sums[0]


def _decode_requests(message: bytes) -> list[Request]:
    requests = []
    for data in decode(message) if message else ():
        id, prompt_token_ids, prompt, sampling, adapter, num_completion_tokens, fields, media = decode(data)
        pooling = None if fields is None else PoolingRequest(**fields)
        requests.append(
            Request(
                RequestId(*id),
                prompt_token_ids,
                prompt,
                decode(sampling),
                adapter,
                num_completion_tokens,
                pooling=pooling,
                media=_decode_media(media),
            )
        )
    return requests


def _encode_media(media: Any, *, shares_memory: bool) -> list[Any] | None:
    if media is None:
        return None
    return list(media) if shares_memory else [bytes(part) for part in media.read()]


def _decode_media(media: list[Any] | None) -> Any:
    if media is None:
        return None
    is_address = all(isinstance(field, int) for field in media)
    return BufferAddress(*media) if is_address else CopiedBuffer([memoryview(bytearray(part)) for part in media])
