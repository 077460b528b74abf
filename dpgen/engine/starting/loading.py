"""Load the model on every rank, with one KV cache size for all.

- The ranks agree on the KV cache that the smallest rank has room for: a min all-reduce between measuring and
  allocating (`parallel.sync_kv_cache`).
- An engine may load before the ranks are there to agree (`ModelLoader.begin`), while its rank reads the input.
- Where a cache that the ranks of a node share is cold, the node's first rank loads and fills it before the others load
  (`parallel.load_first`).
- While a rank waits for others it notices when one of them fails or is lost. After a loss, all load again: a rank that
  was loading continues, and one that has loaded only joins the agreement.
- A rank whose engine can't load the model goes on without one, and its rows go to the others. If more than half of the
  ranks fail, as they do where the configuration is wrong, the run ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from dpgen.config.sections import ParallelConfig
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import Layout
from dpgen.engine.messages import EngineInfo, EngineTextConfig
from dpgen.engine.pool.engine_pool import EnginePool
from dpgen.errors import EngineError
from dpgen.formatting import format_count

logger = logging.getLogger(__name__)

_LOADED = "dpgen/loaded"  # store key: below it, for each node, the number of ranks that have loaded the weights
_READY = "dpgen/ready"  # store key: number of ranks whose engine is ready
_FAILED = "dpgen/failed_to_load"  # store key: number of ranks whose engine can't load the model
_POLL_S = 0.1
_NO_ENGINE_BYTES = 1 << 62  # what a rank without an engine says in the min all-reduce


@dataclass(frozen=True)
class LoadedModel:
    """Describe this rank's loaded engine and its KV cache.

    Attributes:
        measured_kv_bytes: bytes per device that were free for the KV cache on this rank.
        agreed_kv_bytes: bytes per device that the ranks agreed on.
    """

    info: EngineInfo
    measured_kv_bytes: int
    agreed_kv_bytes: int


class ModelLoader:
    """Load this rank's model together with the other ranks.

    Args:
        on_phase: called with the name of what this rank has waited for, after each wait.
    """

    def __init__(
        self, parallel: ParallelConfig, layout: Layout, group: RankGroup, on_phase: Callable[[str], None]
    ) -> None:
        self._parallel, self._layout, self._group, self._on_phase = parallel, layout, group, on_phase
        self._is_in_turn = parallel.load_first == "always"  # the node's first rank loads before its others
        self._measured_kv_bytes = 0
        self._agreed_kv_bytes: int | None = None
        self._error: EngineError | None = None
        self._loaded: LoadedModel | None = None

    def begin(self, engine: EnginePool, *, is_cold: bool, is_wanted: bool) -> None:
        """Let the engine load, until `load`, beside what the rank does, unless another rank loads first. Collective.

        Args:
            is_cold: True if loading would fill a cache that the ranks of this node share.
            is_wanted: False to leave all to `load`.
        """
        cold_ranks = self._group.all_gather_object(is_cold)
        nodes = self._group.nodes
        self._is_in_turn = self._parallel.load_first == "always" or cold_ranks[nodes.index(nodes[self._group.rank])]
        if is_wanted and not self._is_after_node_leader:
            engine.begin_loading()

    def load(self, engine: EnginePool, text_config: EngineTextConfig) -> LoadedModel | None:
        """Load the model and log the KV cache's size. Collective; after a loss of ranks once more.

        Returns:
            None if this rank goes on without an engine, which is abandoned then.

        Raises:
            EngineError: the model cannot be loaded, here and on most ranks.
            PeerFailed: another rank failed, or was lost.
        """
        is_agreeing = self._parallel.sync_kv_cache and None in self._group.all_gather_object(self._agreed_kv_bytes)
        if is_agreeing and self._agreed_kv_bytes is not None:
            self._reduce_kv_bytes(self._agreed_kv_bytes)  # for the ranks that have not agreed yet
        if self._loaded is not None or engine.is_abandoned:
            return self._loaded
        if self._error is None:
            try:
                self._load(engine, text_config)
            except EngineError as error:
                if self._layout.has_shared_engine:
                    raise
                self._error = error
                self._group.checked_store.add(_FAILED, 1)
        if self._error is not None:
            self._go_on_without(engine, self._error, is_agreeing)
        return self._loaded

    def _load(self, engine: EnginePool, text_config: EngineTextConfig) -> None:
        if self._is_after_node_leader:
            self._wait_for_node_leader()
        info = engine.load_model(self._agree_kv_bytes, self._group.raise_if_peer_failed, text_config)
        self._on_phase("KV cache")
        agreed_bytes = self._measured_kv_bytes if self._agreed_kv_bytes is None else self._agreed_kv_bytes
        self._loaded = LoadedModel(info, self._measured_kv_bytes, agreed_bytes)
        logger.info(self._describe(self._loaded))
        self._group.checked_store.add(_READY, 1)

    @property
    def _is_after_node_leader(self) -> bool:
        """True if this rank loads after its node's first rank; processes of one engine load together."""
        if self._layout.has_shared_engine or self._group.is_node_leader or self._parallel.load_first == "never":
            return False
        return self._is_in_turn

    def _wait_for_node_leader(self) -> None:
        log = self._group.make_node_leader_log("to fill the caches (parallel.load_first=never: all load at once)")
        while self._group.checked_store.add(self._node_key, 0) == 0:
            self._group.raise_if_peer_failed()
            log()
            time.sleep(_POLL_S)
        self._on_phase("the node's first model")

    def _agree_kv_bytes(self, measured_bytes: int) -> int:
        """Return the smallest rank's bytes. Collective with `parallel.sync_kv_cache`."""
        self._on_phase("model")
        self._measured_kv_bytes = measured_bytes
        self._group.checked_store.add(self._node_key, 1)
        if not self._parallel.sync_kv_cache:
            return measured_bytes
        agreed_bytes = self._reduce_kv_bytes(measured_bytes)
        self._on_phase("other ranks' models")
        return agreed_bytes

    def _reduce_kv_bytes(self, num_bytes: int) -> int:
        [self._agreed_kv_bytes] = self._group.wait(self._group.all_reduce_async([num_bytes], "min"))
        return self._agreed_kv_bytes

    def _go_on_without(self, engine: EnginePool, error: EngineError, is_agreeing: bool) -> None:
        """Abandon this rank's engine once it is known that most other ranks have one.

        Raises:
            EngineError: this rank's error, if more than half of the ranks fail.
        """
        store = self._group.checked_store
        store.add(self._node_key, 1)  # no other rank of this node waits for its weights
        self._raise_if_most_failed(error)
        if is_agreeing and self._agreed_kv_bytes is None:
            self._reduce_kv_bytes(_NO_ENGINE_BYTES)
        while store.add(_READY, 0) + store.add(_FAILED, 0) < self._group.size:
            self._raise_if_most_failed(error)
            self._group.raise_if_peer_failed()
            time.sleep(_POLL_S)
        self._raise_if_most_failed(error)
        engine.abandon()
        logger.warning(error.describe("continuing without this rank's engine, leaving its rows to other ranks"))

    def _raise_if_most_failed(self, error: EngineError) -> None:
        if 2 * self._group.checked_store.add(_FAILED, 0) > self._group.size:
            raise error

    @property
    def _node_key(self) -> str:
        return f"{_LOADED}/{self._group.nodes[self._group.rank]}"

    def _describe(self, loaded: LoadedModel) -> str:
        if not loaded.agreed_kv_bytes:
            return f"no KV cache, up to {format_count(loaded.info.max_num_seqs, 'sequence')} at a time"
        info, everywhere = loaded.info, " on every rank" if self._parallel.sync_kv_cache else ""
        return (
            f"KV cache: {info.num_kv_blocks:,} blocks of {info.kv_block_tokens} tokens{everywhere} "
            f"({loaded.agreed_kv_bytes / 2**20:,.0f} MiB of {loaded.measured_kv_bytes / 2**20:,.0f} MiB free here), "
            f"up to {format_count(info.max_num_seqs, 'sequence')} at a time"
        )
