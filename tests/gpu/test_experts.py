"""A mixture of experts, split over ranks in lockstep: ranks may have few rows or none, and no rank waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.gpus import GPU_ENGINE, list_gpus
from helpers.jobs import read_run_json, write_into
from helpers.results import load_all_rows
from helpers.tiny_model import save_tiny_qwen3_moe

pytestmark = [pytest.mark.gpu, pytest.mark.multi, pytest.mark.slow]

LOCKSTEP_EXPERTS = ["parallel.launcher=external", "parallel.enable_expert_parallel=true"]
# Sums in another order may turn a near tie of random weights. Experts on wrong ranks turn nearly every row.
MIN_SAME_FRACTION = 0.75


def write_uneven_rows(folder: Path, count: int) -> str:
    model = save_tiny_qwen3_moe(folder / "model")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    return write_into(
        folder,
        [{"prompt": " ".join(words[: 1 + row % 9]) + f" {row}", "budget": 1 + row * 13 % 100} for row in range(count)],
        run={"engine": "vllm"},
        model=str(model),
        engine={**GPU_ENGINE, "max_model_len": 256},
        sampling={"temperature": 0, "ignore_eos": True, "from_columns": {"max_tokens": "budget"}},
    )


def check_rows(run_dir: Path, count: int) -> list[str]:
    """Return the texts of a result, after checking that each row is there once, whole and without an error."""
    rows = load_all_rows(run_dir, count)
    assert [(row["error"], row["num_generated_tokens"]) for row in rows] == [(None, row["budget"]) for row in rows]
    return [row["generated_text"] for row in rows]


def test_experts_split_over_ranks_generate_what_one_engine_does(
    take_gpus: Callable[..., list[str]], start_dpgen: Callable[..., Any], tmp_path: Path
) -> None:
    gpus = take_gpus(max(2, len(list_gpus())))
    conf = write_uneven_rows(tmp_path, 41)
    alone = start_dpgen(gpus[:1], conf, f"run.dir={tmp_path / 'alone' / 'run'}")
    split = start_dpgen(gpus, conf, f"run.dir={tmp_path / 'split' / 'run'}", *LOCKSTEP_EXPERTS, ranks=len(gpus))
    assert alone.wait() == 0, alone.output
    assert split.wait() == 0, split.output
    expected, texts = (check_rows(tmp_path / name / "run", 41) for name in ("alone", "split"))
    num_same = sum(text == other for text, other in zip(texts, expected, strict=True))
    assert num_same >= MIN_SAME_FRACTION * 41, f"{num_same} of 41 rows are those of one engine"


@pytest.mark.parametrize("count", [5, 1])
def test_ranks_with_few_rows_or_none_step_along_with_the_others(
    take_gpus: Callable[..., list[str]], start_dpgen: Callable[..., Any], tmp_path: Path, count: int
) -> None:
    gpus = take_gpus(max(2, len(list_gpus())))
    conf = write_uneven_rows(tmp_path, count)
    job = start_dpgen(gpus, conf, *LOCKSTEP_EXPERTS, ranks=len(gpus))
    assert job.wait() == 0, job.output
    check_rows(tmp_path / "run", count)
    num_rows = [manifest["num_rows"] for manifest in read_run_json(tmp_path / "run")["manifests"]]
    assert sum(num_rows) == count and len(num_rows) == len(gpus)
    assert count > 1 or num_rows.count(0) == len(gpus) - 1
