"""Load the model on every rank, with one KV cache size for all.

- The ranks agree on the KV cache that the smallest rank has room for: a min all-reduce between measuring and
  allocating (`parallel.sync_kv_cache`).
- Where a cache that the ranks of a node share is cold, the node's first rank loads and fills it before the others load
  (`parallel.load_first`).
- While a rank waits for others it notices when one of them fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from dpgen.config.schema import ParallelConfig
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import Layout
from dpgen.engine.messages import EngineInfo, EngineTextConfig
from dpgen.engine.supervisor import EngineSupervisor
from dpgen.formatting import format_count
from dpgen.log import PeriodicLog

logger = logging.getLogger(__name__)

_LOADED = "dpgen/loaded"  # store key: number of ranks with a loaded model; below it, the same for each node
_POLL_S = 0.1


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
        on_phase: called with the name of each phase of the start-up when the phase ends.
    """

    def __init__(
        self, parallel: ParallelConfig, layout: Layout, group: RankGroup, on_phase: Callable[[str], None]
    ) -> None:
        self._parallel, self._layout, self._group, self._on_phase = parallel, layout, group, on_phase
        self._measured_kv_bytes = self._agreed_kv_bytes = 0

    def load(self, engine: EngineSupervisor, text_config: EngineTextConfig, is_cold: bool) -> LoadedModel:
        """Load the model and log the KV cache's size. Collective.

        Args:
            is_cold: True if loading would fill a cache that the ranks of this node share.

        Raises:
            EngineError: the model cannot be loaded.
            PeerFailed: another rank failed.
        """
        wait_log = PeriodicLog(logger, self._describe_wait)
        if self._should_wait_for_node_leader(is_cold):
            self._wait_for_node_leader()
        info = engine.load_model(
            lambda measured_bytes: self._agree_kv_bytes(measured_bytes, wait_log),
            self._group.raise_if_peer_failed,
            text_config,
        )
        self._on_phase("KV cache")
        loaded = LoadedModel(info, self._measured_kv_bytes, self._agreed_kv_bytes)
        logger.info(self._describe(loaded))
        return loaded

    def _should_wait_for_node_leader(self, is_cold: bool) -> bool:
        """Return True if this rank loads after its node's first rank. Collective."""
        is_cold_on_rank = self._group.all_gather_object(is_cold)
        nodes = self._group.nodes
        if self._layout.has_shared_engine or self._group.is_node_leader or self._parallel.load_first == "never":
            return False  # processes of one engine load together
        node_leader = nodes.index(nodes[self._group.rank])
        return self._parallel.load_first == "always" or is_cold_on_rank[node_leader]

    def _wait_for_node_leader(self) -> None:
        while self._group.store.add(self._node_key, 0) == 0:
            self._group.raise_if_peer_failed()
            time.sleep(_POLL_S)
        self._on_phase("the node's first model")

    def _agree_kv_bytes(self, measured_bytes: int, on_wait: Callable[[], None]) -> int:
        """Return the smallest rank's bytes. Collective with `parallel.sync_kv_cache`."""
        self._on_phase("model")
        self._measured_kv_bytes = self._agreed_kv_bytes = measured_bytes
        self._group.store.add(self._node_key, 1)
        if self._parallel.sync_kv_cache:
            self._group.store.add(_LOADED, 1)
            [self._agreed_kv_bytes] = self._group.wait(self._group.all_reduce_async([measured_bytes], "min"), on_wait)
            self._on_phase("other ranks' models")
        return self._agreed_kv_bytes

    @property
    def _node_key(self) -> str:
        return f"{_LOADED}/{self._group.nodes[self._group.rank]}"

    def _describe_wait(self) -> str:
        num_loaded = self._group.store.add(_LOADED, 0)
        return (
            f"model loaded on {num_loaded} of {self._group.size} ranks, waiting for the others to agree on the "
            "KV cache size (parallel.sync_kv_cache=false skips this)"
        )

    def _describe(self, loaded: LoadedModel) -> str:
        info, everywhere = loaded.info, " on every rank" if self._parallel.sync_kv_cache else ""
        return (
            f"KV cache: {info.num_kv_blocks:,} blocks of {info.kv_block_tokens} tokens{everywhere} "
            f"({loaded.agreed_kv_bytes / 2**20:,.0f} MiB of {loaded.measured_kv_bytes / 2**20:,.0f} MiB free here), "
            f"up to {format_count(info.max_num_seqs, 'sequence')} at a time"
        )
