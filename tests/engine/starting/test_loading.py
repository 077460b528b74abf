"""Loading on several ranks: who waits for whom, and the KV cache size that all get."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import pytest

from dpgen.config.sections import ParallelConfig
from dpgen.distributed.group import PeerLost, PendingReduce, SingleRankGroup
from dpgen.distributed.layout import Layout
from dpgen.engine.messages import EngineInfo, EngineTextConfig
from dpgen.engine.pool.engine_pool import EnginePool
from dpgen.engine.starting.loading import LoadedModel, ModelLoader
from dpgen.errors import EngineError, PeerFailed

INFO = EngineInfo(max_num_seqs=8, max_model_len=100, num_kv_blocks=2048, kv_block_tokens=16)
MIB = 1 << 20


class FakeEngine:
    """Measure 8 MiB, and take whatever the ranks agree on.

    Args:
        error: what loading raises before or after the agreement; None for an engine that loads.
    """

    def __init__(self, error: EngineError | None = None, fails_after_agreement: bool = False) -> None:
        self._error, self._fails_after_agreement = error, fails_after_agreement
        self.is_abandoned, self.has_begun, self.num_loads = False, False, 0

    def begin_loading(self) -> None:
        self.has_begun = True

    def load_model(
        self, agree_kv: Callable[[int], int], on_wait: Callable[[], None], text_config: EngineTextConfig
    ) -> EngineInfo:
        self.num_loads += 1
        if self._error is not None and not self._fails_after_agreement:
            raise self._error
        self.kv_bytes = agree_kv(8 * MIB)
        if self._error is not None:
            raise self._error
        return INFO

    def abandon(self) -> None:
        self.is_abandoned = True


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
        self.reduced: list[int] = []
        self.peer_agreed_bytes: int | None = None

    def all_gather_object(self, value: Any) -> list[Any]:
        return [self._peer_is_cold if isinstance(value, bool) else self.peer_agreed_bytes, value]

    def all_reduce_async(self, values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        assert op == "min"
        self.reduced += values
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
    loader.begin(cast(EnginePool, engine), is_cold=is_cold, is_wanted=True)
    loaded = loader.load(cast(EnginePool, engine), EngineTextConfig())
    assert loaded is not None
    return loaded, engine, phases


def load_with(loader: ModelLoader, engine: FakeEngine) -> LoadedModel | None:
    return loader.load(cast(EnginePool, engine), EngineTextConfig())


def make_loader(group: SingleRankGroup, layout: Layout | None = None) -> ModelLoader:
    return ModelLoader(ParallelConfig(), layout or Layout(num_engines=group.size), group, lambda phase: None)


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
    _, engine, phases = load(group, is_cold=is_cold, load_first=load_first)
    assert ("the node's first model" in phases) == (group.num_polls == 3) == waits
    assert engine.has_begun != waits, "a rank that waits for no other loads while it reads the input"


def test_a_rank_whose_node_s_first_rank_fills_a_cache_waits_also_once_the_cache_holds_something() -> None:
    group, engine = TwoRankGroup(peer_is_cold=True), FakeEngine()
    loader = make_loader(group)
    loader.begin(cast(EnginePool, engine), is_cold=True, is_wanted=True)
    group._peer_is_cold = False  # rank 0 has begun to write to it
    load_with(loader, engine)
    assert group.num_polls == 3 and not engine.has_begun


def test_no_engine_loads_ahead_in_a_run_directory_that_may_hold_the_result() -> None:
    engine = FakeEngine()
    make_loader(SingleRankGroup()).begin(cast(EnginePool, engine), is_cold=False, is_wanted=False)
    assert not engine.has_begun


def test_processes_that_share_an_engine_load_together() -> None:
    _, _, phases = load(TwoRankGroup(peer_is_cold=True), Layout(num_engines=1, group_size=2))
    assert "the node's first model" not in phases


def test_a_rank_that_waits_for_the_nodes_first_rank_notices_its_failure() -> None:
    with pytest.raises(PeerFailed, match="no such device"):
        load(TwoRankGroup(peer_is_cold=True, polls_until_loaded=None))


@pytest.mark.parametrize("fails_after_agreement", [False, True])
def test_a_rank_whose_engine_cannot_load_continues_without_it(
    fails_after_agreement: bool, caplog: pytest.LogCaptureFixture
) -> None:
    group, engine = TwoRankGroup(peer_is_cold=False), FakeEngine(EngineError("no such device"), fails_after_agreement)
    group.store.add("dpgen/ready", 1)
    loader = make_loader(group)
    assert load_with(loader, engine) is None
    assert engine.is_abandoned
    assert group.reduced == [8 * MIB if fails_after_agreement else 1 << 62], "it says once what it has room for"
    assert caplog.messages == ["no such device, continuing without this rank's engine, leaving its rows to other ranks"]
    assert load_with(loader, engine) is None, "after a loss of ranks it has no engine either"
    assert engine.num_loads == 1


def test_a_model_that_most_ranks_cannot_load_ends_the_run() -> None:
    group, engine = TwoRankGroup(peer_is_cold=False), FakeEngine(EngineError("no such device"))
    group.store.add("dpgen/failed_to_load", 1)
    with pytest.raises(EngineError, match="no such device"):
        load_with(make_loader(group), engine)
    with pytest.raises(EngineError, match="no such device"):
        load_with(make_loader(SingleRankGroup()), engine)


def test_a_rank_waits_for_the_others_engines_before_it_continues_without_its_own() -> None:
    group, engine = TwoRankGroup(peer_is_cold=False), FakeEngine(EngineError("no such device"))
    group.store.add("dpgen/failed_to_load", -1)
    group.store.add("dpgen/failed_to_load", 1)
    looks = 0

    def fail_at_the_third_look() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            group.store.add("dpgen/failed_to_load", 1)

    group.raise_if_peer_failed = fail_at_the_third_look  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        load_with(make_loader(group), engine)
    assert looks == 3 and not engine.is_abandoned


def test_an_engine_that_shares_its_ranks_cannot_be_done_without() -> None:
    group, engine = TwoRankGroup(peer_is_cold=False), FakeEngine(EngineError("no such device"))
    group.store.add("dpgen/ready", 1)
    with pytest.raises(EngineError):
        load_with(make_loader(group, Layout(num_engines=1, group_size=2)), engine)


def test_after_a_loss_a_loaded_rank_joins_the_agreement_of_those_that_still_load() -> None:
    group, engine = TwoRankGroup(peer_is_cold=False), FakeEngine()
    loader = make_loader(group)
    loaded = load_with(loader, engine)
    assert group.reduced == [8 * MIB]
    assert load_with(loader, engine) is loaded
    assert group.reduced == [8 * MIB, 2 * MIB], "the size that its engine has already"
    group.peer_agreed_bytes = 2 * MIB
    assert load_with(loader, engine) is loaded
    assert len(group.reduced) == 2 and engine.num_loads == 1, "all have agreed, and this engine has loaded"


def test_a_loss_during_the_agreement_leaves_the_engine_to_load_on() -> None:
    group, engine = TwoRankGroup(peer_is_cold=False), FakeEngine()
    loader, reduce = make_loader(group), group.all_reduce_async

    def lose(values: Sequence[int], op: Literal["sum", "min"]) -> PendingReduce:
        raise PeerLost("lost rank 0")

    group.all_reduce_async = lose  # type: ignore[method-assign]
    with pytest.raises(PeerLost):
        load_with(loader, engine)
    group.all_reduce_async = reduce  # type: ignore[method-assign]
    loaded = load_with(loader, engine)
    assert loaded is not None and loaded.agreed_kv_bytes == 2 * MIB
