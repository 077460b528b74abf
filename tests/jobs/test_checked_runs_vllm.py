"""Checks on real vLLM (its CPU build): the recipe conf/checked.yaml, and samples that go on where they were cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import REPO, load_result, read_run_json
from helpers.kept_engine import KeptEngine
from helpers.tiny_model import ENGINE

pytestmark = [pytest.mark.vllm, pytest.mark.multi, pytest.mark.xdist_group("engines")]  # one engine runs all

WORDS = "the quick brown fox jumps over the lazy dog"
# A random model writes no JSON by itself; with this choice it does, at its second attempt.
ANSWERS = ['{"title":"a","keywords":[]}', '{"title":"b","keywords":["x"]}']
TEMPLATE = "{% if enable_thinking %}think{% endif %}{{ messages[0].content }}"


@pytest.fixture
def run(kept_engine: KeptEngine, plain_model: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    def run(name: str, rows: list[dict[str, Any]], *arguments: str) -> list[Any]:
        return load_result(kept_engine.run_rows(tmp_path / name, rows, plain_model, ENGINE, *arguments))

    return run


def test_the_recipe_of_checked_rows_generates_again_what_fails(run: Callable[..., list[Any]], tmp_path: Path) -> None:
    articles = [{"article": WORDS[: 10 + 4 * index]} for index in range(6)]
    retry_sampling = {"temperature": 1.0, "structured_outputs": {"choice": ANSWERS}}
    rows = run(
        "checked",
        articles,
        str(REPO / "conf" / "checked.yaml"),
        f"data.chat_template={TEMPLATE}",
        "sampling.max_tokens=60",
        "check.continue_truncated=false",
        f"check.retry_sampling={json.dumps(retry_sampling)}",
    )
    assert [row["error"] for row in rows] == [None] * 6
    for row in rows:
        assert json.loads(row["parsed"])["title"] in ("a", "b") and row["rejected_text"] is None
    [manifest] = read_run_json(tmp_path / "checked")["manifests"]
    assert sum(manifest["num_retries"].values()) >= 6 and manifest["num_rejected_tokens"] > 0


def test_a_continued_greedy_sample_equals_the_uninterrupted_one(run: Callable[..., list[Any]], tmp_path: Path) -> None:
    prompts = [{"prompt": WORDS[: 3 + 7 * index]} for index in range(6)]
    shared = [
        "data.prompt_column=prompt",
        "sampling.temperature=0",
        "sampling.logprobs=2",
        "sampling.prompt_logprobs=0",
    ]
    whole = run("whole", prompts, *shared, "sampling.max_tokens=24")
    pieces = run(
        "pieces",
        prompts,
        *shared,
        "sampling.max_tokens=8",
        "check.continue_truncated=true",
        "check.max_attempts=2",
        "check.retry_sampling={max_tokens: 16}",
    )
    floats = ("token_logprobs", "top_logprobs", "cumulative_logprob", "prompt_logprobs")
    for one, other in zip(whole, pieces, strict=True):
        assert {name: value for name, value in one.items() if name not in floats} == {
            name: value for name, value in other.items() if name not in floats
        }
        assert other["num_generated_tokens"] == len(other["generated_token_ids"]) == len(other["token_logprobs"])
        for name in floats[:3]:
            assert np.allclose(one[name], other[name], atol=1e-3), name
    [manifest] = read_run_json(tmp_path / "pieces")["manifests"]
    assert manifest["num_retries"] == {"truncated": 6} and manifest["num_rejected_tokens"] == 0
