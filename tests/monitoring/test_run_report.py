"""The lines at the end of a run: balance, stragglers, caches."""

from __future__ import annotations

import pytest

from dpgen.monitoring.run_report import balance, summarize_run
from dpgen.records import RankManifest


def make_manifest(rank: int, busy_s: float, **fields: int) -> RankManifest:
    """Return the manifest of a rank that generated 100 tokens/s, or as many tokens as given."""
    num_tokens = fields.pop("tokens", int(100 * busy_s))
    return RankManifest(rank, f"node{rank}", num_generated_tokens=num_tokens, busy_s=busy_s, **fields)


def test_balance_is_the_mean_busy_time_over_the_longest() -> None:
    assert balance([make_manifest(0, 10.0), make_manifest(1, 8.0)]) == pytest.approx(0.9)
    assert balance([make_manifest(0, 0.0)]) == 1.0


def test_a_straggler_is_named_with_its_node() -> None:
    manifests = [make_manifest(0, 60.0), make_manifest(1, 60.0, tokens=2400), make_manifest(2, 54.0)]
    assert list(summarize_run(manifests)) == [
        "ranks were busy for 54 s to 1 min 00 s: balance 0.97 (mean over longest)",
        "rank 1 on node1 was slow: 40 tokens/s, 40 % of the other ranks' median",
    ]


def test_equal_busy_times_appear_once() -> None:
    assert list(summarize_run([make_manifest(0, 5.0), make_manifest(1, 5.0)])) == [
        "ranks were busy for 5 s: balance 1.00 (mean over longest)"
    ]


def test_caches_appear_only_if_they_mattered() -> None:
    lines = summarize_run([make_manifest(0, 5.0, num_prompt_tokens=1000, num_cached_tokens=830, num_preemptions=7)])
    assert list(lines) == [
        "prefix cache: 83 % of all prompt tokens were cached",
        "KV cache: 7 preemptions, each recomputed a sequence since the cache was full. "
        "A larger KV cache or a lower engine.max_num_seqs avoids them",
    ]
    assert list(summarize_run([make_manifest(0, 5.0)])) == []
