"""Loading on several ranks: who waits for whom, and the KV cache size that all get."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import pytest

from dpgen.config.schema import ParallelConfig
from dpgen.distributed.group import PendingReduce, SingleRankGroup
from dpgen.distributed.layout import Layout
from dpgen.engine.loading import LoadedModel, ModelLoader
from dpgen.engine.messages import EngineInfo, EngineTextConfig
from dpgen.engine.supervisor import EngineSupervisor
from dpgen.errors import PeerFailed

INFO = EngineInfo(max_num_seqs=8, max_model_len=100, num_kv_blocks=2048, kv_block_tokens=16)
MIB = 1 << 20


class FakeEngine:
    """Measure 8 MiB, and take whatever the ranks agree on."""

    def load_model(
        self, agree_kv: Callable[[int], int], on_wait: Callable[[], None], text_config: EngineTextConfig
    ) -> EngineInfo:
        self.kv_bytes = agree_kv(8 * MIB)
        return INFO


class TwoRankGroup(SingleRankGroup):
    """Rank 1 of two on one node; rank 0's values are given.

    Args:
        peer_is_cold: rank 0's caches.
        polls_until_loaded: rank 0's model is loaded after so many looks at its failure; None for a rank 0 that fails.
    """

    rank, size = 1, 2

    def __init__(self, peer_is_cold: bool, polls_until_loaded: int | None = 3) -> None:
        super().__init__()
        self.nodes = ["node", "node"]
        self._peer_is_cold, self._polls_until_loaded = peer_is_cold, polls_until_loaded
        self.num_polls = 0

    def all_gather_object(self, value: Any) -> list[Any]:
        return [self._peer_is_cold, value]

    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        assert op == "min"
        return super().all_reduce_async([min(value, 2 * MIB) for value in values], op)

    def raise_if_peer_failed(self) -> None:
        self.num_polls += 1
        if self._polls_until_loaded is None:
            raise PeerFailed("rank 0 failed: no such device")
        if self.num_polls == self._polls_until_loaded:
            self.store.add("dpgen/loaded/node", 1)


def load(
    group: SingleRankGroup, layout: Layout | None = None, is_cold: bool = False, **parallel: Any
) -> tuple[LoadedModel, FakeEngine, list[str]]:
    engine, phases = FakeEngine(), list[str]()
    layout = layout or Layout(num_engines=group.size)
    loader = ModelLoader(ParallelConfig(**parallel), layout, group, phases.append)
    loaded = loader.load(cast(EngineSupervisor, engine), EngineTextConfig(), is_cold)
    return loaded, engine, phases


def test_every_rank_gets_the_smallest_ranks_kv_cache(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dpgen")
    loaded, engine, phases = load(TwoRankGroup(peer_is_cold=False))
    assert loaded == LoadedModel(INFO, measured_kv_bytes=8 * MIB, agreed_kv_bytes=2 * MIB)
    assert engine.kv_bytes == 2 * MIB
    assert phases == ["model", "other ranks' models", "KV cache"]
    assert caplog.messages == [
        "KV cache: 2,048 blocks of 16 tokens on every rank (2 MiB of 8 MiB free here), up to 8 sequences at a time"
    ]


def test_without_the_agreement_a_rank_takes_what_it_has_and_waits_for_nobody() -> None:
    loaded, engine, phases = load(TwoRankGroup(peer_is_cold=False), sync_kv_cache=False)
    assert loaded.agreed_kv_bytes == engine.kv_bytes == 8 * MIB
    assert phases == ["model", "KV cache"]


@pytest.mark.parametrize(
    ("load_first", "peer_is_cold", "is_cold", "waits"),
    [
        ("auto", True, False, True),
        ("auto", False, True, False),
        ("always", False, False, True),
        ("never", True, True, False),
    ],
)
def test_a_rank_waits_where_the_nodes_first_rank_has_a_cache_to_fill(
    load_first: str, peer_is_cold: bool, is_cold: bool, waits: bool
) -> None:
    group = TwoRankGroup(peer_is_cold)
    _, _, phases = load(group, is_cold=is_cold, load_first=load_first)
    assert ("the node's first model" in phases) == (group.num_polls == 3) == waits


def test_processes_that_share_an_engine_load_together() -> None:
    _, _, phases = load(TwoRankGroup(peer_is_cold=True), Layout(num_engines=1, group_size=2))
    assert "the node's first model" not in phases


def test_a_rank_that_waits_for_the_nodes_first_rank_notices_its_failure() -> None:
    with pytest.raises(PeerFailed, match="no such device"):
        load(TwoRankGroup(peer_is_cold=True, polls_until_loaded=None))
