"""The hooks in vLLM's work for each token: each decides as vLLM itself would, for any mix of rows."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest

from dpgen.engine.vllm.versions import takes_hooks

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 4


def test_hooks_are_for_versions_of_vllm_whose_code_was_read() -> None:
    assert takes_hooks("0.26.0") and takes_hooks("0.32.1.dev4+g12ab")
    assert not any(map(takes_hooks, ("0.25.9", "0.3.2", "0.34.0", "1.0.0")))


def test_requests_of_the_same_name_get_names_of_their_own() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    from dpgen.engine.vllm.hooks.hot_path import NameHook

    processor = SimpleNamespace(assign_request_id=InputProcessor.assign_request_id)
    hook = NameHook(processor)
    hook.install()
    requests = [SimpleNamespace(request_id="a", external_req_id=None) for _ in range(3)]
    for request in requests:
        processor.assign_request_id(request)
    assert len({request.request_id for request in requests}) == 3
    assert all(request.external_req_id == "a" and request.request_id.startswith("a-") for request in requests)
    with pytest.raises(ValueError, match="external_req_id"):
        processor.assign_request_id(requests[0])
    hook.remove()
    assert processor.assign_request_id is InputProcessor.assign_request_id


def make_manager(*, enable_caching: bool) -> Any:
    """Return a `KVCacheManager` of vLLM with 60 blocks."""
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    config = KVCacheConfig(num_blocks=60, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(
        config,
        max_model_len=200,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        enable_caching=enable_caching,
    )


class Steps:
    """Add, step, preempt and end sequences as vLLM's scheduler does; note what its manager answers."""

    def __init__(self, manager: Any) -> None:
        self.manager, self.log = manager, list[Any]()

    def run(self, seed: int) -> list[Any]:
        dice, running = random.Random(seed), dict[str, Any]()
        for step in range(400):
            if len(running) < 6 and dice.random() < 0.3:
                self._start(running, str(step), dice)
            for id, request in list(running.items()):
                self._step(running, id, request, dice)
        return self.log

    def _start(self, running: dict[str, Any], id: str, dice: random.Random) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        prompt = [7] * dice.randrange(1, 12) + [dice.randrange(3) for _ in range(dice.randrange(8))]
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256) if self.manager.enable_caching else None
        request = Request(id, prompt, SamplingParams(max_tokens=50), None, block_hasher=hasher)
        blocks, num_hits, *_ = self.manager.get_computed_blocks(request)
        new = self.manager.allocate_slots(
            request,
            len(prompt) - num_hits,
            num_new_computed_tokens=num_hits,
            new_computed_blocks=blocks,
            num_lookahead_tokens=0,
        )
        self._note(request, new)
        if new is not None:
            request.num_computed_tokens = len(prompt)
            running[id] = request

    def _step(self, running: dict[str, Any], id: str, request: Any, dice: random.Random) -> None:
        request.append_output_token_ids(dice.randrange(3))
        self.manager.cache_blocks(request, request.num_computed_tokens)
        new = self.manager.allocate_slots(request, 1, num_lookahead_tokens=0)
        self._note(request, new)
        if new is None or dice.random() < 0.03 or request.num_tokens > 90:  # preempted, or finished
            self.manager.free(request)
            del running[id]
        else:
            request.num_computed_tokens += 1

    def _note(self, request: Any, new: Any) -> None:
        [blocks] = self.manager.coordinator.single_type_managers
        ids = None if new is None else new.get_block_ids()
        held = [block.block_id for block in blocks.req_to_blocks.get(request.request_id, ())]
        free = self.manager.block_pool.get_num_free_blocks()
        self.log.append((request.request_id, ids, held, blocks.num_cached_block.get(request.request_id), free))


@pytest.mark.parametrize("enable_caching", [True, False])
def test_blocks_are_allocated_and_cached_as_without_the_hook(enable_caching: bool) -> None:
    from dpgen.engine.vllm.hooks.hot_path import BlockHook

    for seed in range(5):
        plain = make_manager(enable_caching=enable_caching)
        hooked, num_calls = make_manager(enable_caching=enable_caching), 0
        allocate = hooked.allocate_slots

        def count(*args: Any, allocate: Any = allocate, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return allocate(*args, **kwargs)

        hooked.allocate_slots = count
        BlockHook(hooked, hooked.coordinator.single_type_managers[0]).install()
        expected, found = Steps(plain).run(seed), Steps(hooked).run(seed)
        assert found == expected
        assert any(ids is None for _, ids, *_ in expected), "the blocks were short at times"
        assert num_calls < 0.8 * len(found), "vLLM was asked for the tokens that begin or complete a block alone"


def test_a_row_has_the_same_tokens_as_without_the_hook() -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    from dpgen.engine.vllm.hooks.hot_path import OutputHook

    final, stream = RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE
    kinds = {"a": final, "b": final, "streamed": stream, "aborted": final}

    def generate(processor: Any) -> list[tuple[str, list[int], bool]]:
        found = []
        for id, kind in kinds.items():
            params = SamplingParams(output_kind=kind, detokenize=False)
            request = EngineCoreRequest(id, [1, 2], None, params, None, time.time(), None, None, None)
            request.external_req_id = id
            processor.add_request(request, None)
        for step in range(9):
            running = [id for id in kinds if not (id == "a" and step > 4)]
            is_last = {"a": step == 4, "b": step == 8, "streamed": step == 8, "aborted": step == 8}
            outputs = [
                EngineCoreOutput(id, [10 * step + i], finish_reason=FinishReason.LENGTH if is_last[id] else None)
                for i, id in enumerate(running)
            ]
            if step == 6:
                processor.abort_requests(["aborted"], internal=True)
            for output in processor.process_outputs(outputs).request_outputs:
                found.append((output.request_id, list(output.outputs[0].token_ids), output.finished))
        assert not processor.request_states
        return found

    hooked: Any = OutputProcessor(None, log_stats=False)
    seen = list[str]()
    process = hooked.process_outputs

    def note(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(output.request_id for output in outputs)
        return process(outputs, *args, **kwargs)

    hooked.process_outputs = note
    OutputHook(hooked).install()
    assert generate(hooked) == generate(OutputProcessor(None, log_stats=False))
    assert seen.count("streamed") == 9, "a stream needs every token"
    assert seen.count("a") == seen.count("b") == 2, "the first one and the last one"
