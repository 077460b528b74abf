"""Spare vLLM, for each token and each request, the work that leads to nothing in a batch job.

- For each token of each sequence vLLM looks for a KV block to allocate and to cache, and updates what a stream would
  show. Here one comparison finds out that there is nothing to do. That is so for 14 of the 16 tokens of a block, and,
  without a stream, for all tokens but the last.
- For each request it asks the kernel for random bytes, so that two requests of the same name differ. A count does, too.
- Each hook wraps a method of one object, decides only what vLLM itself would decide, and leaves all else to vLLM.
- Hooks are installed only in versions of vLLM whose code was read (`versions.HOOKED`), and where one kind of attention,
  which keeps all blocks, is all that the model has. Speculative decoding, connectors and the like do without.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import RequestOutputKind


def install_hooks(engine: Any) -> tuple[OutputHook | BlockHook | NameHook, ...]:
    """Install all hooks that fit vLLM's `LLMEngine`, and return them."""
    hooks: list[OutputHook | BlockHook | NameHook] = [
        OutputHook(engine.output_processor),
        NameHook(engine.input_processor),
    ]
    scheduler = engine.engine_core.engine_core.scheduler
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    is_plain = len(managers) == 1 and type(managers[0]).__name__ == "FullAttentionManager"
    config = engine.vllm_config
    if is_plain and config.speculative_config is None and config.kv_transfer_config is None:
        hooks.append(BlockHook(scheduler.kv_cache_manager, managers[0]))
    for hook in hooks:
        hook.install()
    return tuple(hooks)


class NameHook:
    """Tell requests of the same name apart by a count, where vLLM draws a random number for each.

    Args:
        processor: vLLM's `InputProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._assign, self._numbers = processor, processor.assign_request_id, itertools.count()

    def install(self) -> None:
        self._processor.assign_request_id = self._assign_request_id

    def remove(self) -> None:
        self._processor.assign_request_id = self._assign

    def _assign_request_id(self, request: Any) -> None:
        if request.external_req_id is not None:
            self._assign(request)  # which rejects it
            return
        request.external_req_id = request.request_id
        request.request_id = f"{request.request_id}-{next(self._numbers):x}"


class OutputHook:
    """Add tokens to the requests that have no text, no stream and no log-probabilities before they end.

    Args:
        processor: vLLM's `OutputProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._process = processor, processor.process_outputs
        self._tokens: dict[str, list[int]] = {}  # of the running requests for which that is all

    def install(self) -> None:
        self._processor.process_outputs = self._process_outputs

    def remove(self) -> None:
        self._processor.process_outputs = self._process
        self._tokens.clear()

    def _process_outputs(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        get_tokens, others = self._tokens.get, []
        for output in outputs:
            tokens = get_tokens(output.request_id)
            if tokens is not None and output.finish_reason is None:
                tokens += output.new_token_ids
            else:
                others.append(output)
        processed = self._process(others, *args, **kwargs)
        states = self._processor.request_states
        for output in others:
            state = states.get(output.request_id)
            if state is None:
                self._tokens.pop(output.request_id, None)
            elif _needs_tokens_only(state):
                self._tokens[output.request_id] = state.detokenizer.token_ids
        return processed


def _needs_tokens_only(state: Any) -> bool:
    """Return True if nothing but a list of tokens becomes of a running request's outputs until the last one.

    Args:
        state: vLLM's `RequestState`.
    """
    logprobs = state.logprobs_processor
    return (
        type(state.detokenizer).__name__ == "IncrementalDetokenizer"  # the one that makes no text
        and state.output_kind == RequestOutputKind.FINAL_ONLY
        and not state.is_prefilling
        and state.stats is None
        and logprobs.num_logprobs is None
        and logprobs.num_prompt_logprobs is None
    )


class BlockHook:
    """Find out at once that a running sequence's next token needs no KV block, and completes none.

    Args:
        manager: vLLM's `KVCacheManager`.
        blocks: its only `FullAttentionManager`.
    """

    def __init__(self, manager: Any, blocks: Any) -> None:
        self._manager = manager
        self._allocate, self._cache = manager.allocate_slots, manager.cache_blocks
        self._block_size, self._nothing = blocks.block_size, manager.empty_kv_cache_blocks
        self._blocks_of, self._num_cached = blocks.req_to_blocks, blocks.num_cached_block
        self._caches = manager.enable_caching

    def install(self) -> None:
        self._manager.allocate_slots, self._manager.cache_blocks = self._allocate_slots, self._cache_blocks

    def remove(self) -> None:
        self._manager.allocate_slots, self._manager.cache_blocks = self._allocate, self._cache

    def _allocate_slots(self, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if num_new_tokens == 1 and not args and _is_plain(kwargs):
            num_tokens = request.num_computed_tokens + 1
            blocks = self._blocks_of.get(request.request_id, ())
            if num_tokens <= self._block_size * len(blocks) and not self._completes_block(request, num_tokens):
                return self._nothing
        return self._allocate(request, num_new_tokens, *args, **kwargs)

    def _cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        if self._completes_block(request, num_computed_tokens):
            self._cache(request, num_computed_tokens)

    def _completes_block(self, request: Any, num_tokens: int) -> bool:
        """Return True if there may be a block to cache once this many tokens of a request are computed."""
        num_cached: int = self._num_cached.get(request.request_id, 0)
        return bool(self._caches) and num_tokens >= int(self._block_size) * (num_cached + 1)


def _is_plain(kwargs: dict[str, Any]) -> bool:
    return not kwargs or (len(kwargs) == 1 and kwargs.get("num_lookahead_tokens") == 0)
