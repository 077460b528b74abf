"""Measure what the hooks in vLLM's work for each token save, without a model: on vLLM's own objects alone.

    python benchmarks/hot_path.py [--seqs 128] [--tokens 160] [--rounds 7]

Ways, in turn in every round, on `KVCacheManager` (a slot for each token, and blocks to cache) and on `OutputProcessor`
(a token without text): as vLLM is, and with the hook of dpgen/engine/vllm/hooks. Prints microseconds of processor
time a token, and one JSON line last. engine_core.py measures the same on a whole engine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from measure import compute_ratio, make_parser, measure_in_turn, run_benchmark

_BLOCK_SIZE, _PROMPT_TOKENS = 16, 40


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seqs", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    settings = {"seqs": options.seqs, "tokens": options.tokens, "rounds": options.rounds}
    run_benchmark("hot_path", options.dir, lambda work_dir: measure(options, work_dir), **settings)


def measure(options: argparse.Namespace, _: Path) -> dict[str, Any]:
    found = {}
    for name, run in (("blocks", run_blocks), ("outputs", run_outputs)):
        run(options, has_hook=True)  # fills caches
        ways = {
            f"{name}, plain": lambda run=run: run(options, has_hook=False),
            f"{name}, hook": lambda run=run: run(options, has_hook=True),
        }
        plain, hook = measure_in_turn(ways, options.rounds).values()
        found[name] = {
            "plain_us": round(statistics.median(plain), 2),
            "hook_us": round(statistics.median(hook), 2),
            "hook_over_plain": compute_ratio(hook, plain),
        }
    return found


def run_blocks(options: argparse.Namespace, *, has_hook: bool) -> float:
    """Return microseconds for each token's `allocate_slots` and `cache_blocks`."""
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    from dpgen.engine.vllm.hooks.hot_path import BlockHook

    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=_BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    num_blocks = options.seqs * (2 + (_PROMPT_TOKENS + options.tokens) // _BLOCK_SIZE) + 1
    config = KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    manager = KVCacheManager(config, 4096, scheduler_block_size=_BLOCK_SIZE, hash_block_size=_BLOCK_SIZE)
    if has_hook:
        BlockHook(manager, manager.coordinator.single_type_managers[0]).install()
    requests = []
    for row in range(options.seqs):
        hasher = get_request_block_hasher(_BLOCK_SIZE, sha256)
        request = Request(str(row), [row] * _PROMPT_TOKENS, SamplingParams(max_tokens=999), None, block_hasher=hasher)
        hits, num_hits, *_ = manager.get_computed_blocks(request)
        manager.allocate_slots(
            request, _PROMPT_TOKENS - num_hits, num_new_computed_tokens=num_hits, new_computed_blocks=hits
        )
        request.num_computed_tokens = _PROMPT_TOKENS
        requests.append(request)
    seconds = 0.0
    for _ in range(options.tokens):
        for request in requests:
            request.append_output_token_ids(7)
        began_s = time.process_time()
        for request in requests:
            manager.allocate_slots(request, 1, num_lookahead_tokens=0)
        for request in requests:
            manager.cache_blocks(request, request.num_computed_tokens)
        seconds += time.process_time() - began_s
        for request in requests:
            request.num_computed_tokens += 1
    return float(1e6 * seconds / options.tokens / options.seqs)


def run_outputs(options: argparse.Namespace, *, has_hook: bool) -> float:
    """Return microseconds for each token's part of `process_outputs`."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

    from dpgen.engine.vllm.hooks.hot_path import OutputHook

    processor = OutputProcessor(None, log_stats=False)
    if has_hook:
        OutputHook(processor).install()
    for row in range(options.seqs):
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False)
        request = EngineCoreRequest(str(row), [1, 2], None, params, None, time.time(), None, None, None)
        request.external_req_id = str(row)
        processor.add_request(request, None)
    seconds = 0.0
    for _ in range(options.tokens):
        outputs = [EngineCoreOutput(str(row), [5]) for row in range(options.seqs)]
        began_s = time.process_time()
        processor.process_outputs(outputs)
        seconds += time.process_time() - began_s
    return float(1e6 * seconds / options.tokens / options.seqs)


if __name__ == "__main__":
    main()
