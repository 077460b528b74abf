"""What a run says of itself at its end."""

from __future__ import annotations

import pytest

from dpgen.monitoring.run_report import RankManifest, balance, summarize_run


def manifest(rank: int, busy_s: float, **more: int) -> RankManifest:
    return RankManifest(
        rank, f"node{rank}", num_generated_tokens=more.pop("tokens", int(100 * busy_s)), busy_s=busy_s, **more
    )


def test_balance_is_the_mean_over_the_longest() -> None:
    assert balance([manifest(0, 10.0), manifest(1, 8.0)]) == pytest.approx(0.9)
    assert balance([manifest(0, 0.0)]) == 1.0


def test_a_slow_rank_is_named_with_its_node() -> None:
    ranks = [manifest(0, 60.0), manifest(1, 60.0, tokens=2400), manifest(2, 54.0)]
    assert list(summarize_run(ranks)) == [
        "ranks were busy for 54 s to 1 min 00 s: balance 0.97 (mean over longest)",
        "rank 1 on node1 was slow: 40 tokens/s, 40 % of the others' median",
    ]


def test_equal_times_are_told_once() -> None:
    assert list(summarize_run([manifest(0, 5.0), manifest(1, 5.0)])) == [
        "ranks were busy for 5 s: balance 1.00 (mean over longest)"
    ]


def test_caches_are_mentioned_where_they_mattered() -> None:
    [cached, short] = summarize_run(
        [manifest(0, 5.0, num_prompt_tokens=1000, num_cached_tokens=830, num_preemptions=7)]
    )
    assert cached == "prefix cache: 83 % of the prompts' tokens were there already"
    assert short.startswith("KV cache: 7 times a sequence was set back")
    assert list(summarize_run([manifest(0, 5.0)])) == []
