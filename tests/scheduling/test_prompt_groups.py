"""Lengths learnt while running: one row of each prompt first, then the others by what it took."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import REPO, Launcher, load_result

from dpgen.config.schema import WorkConfig
from dpgen.journal.reader import index_journal
from dpgen.scheduling.order import RowOrder, order_by_measured_lengths
from dpgen.scheduling.prompt_groups import PromptGroups, RankState, group_by_prompt
from dpgen.simulation.lengths import sample_lengths
from dpgen.simulation.simulator import EngineCostModel, simulate


def hand(finished: dict[int, int], running: list[int]) -> RankState:
    as_array = [np.array(list(each), dtype=np.int64) for each in (finished, finished.values(), running)]
    return RankState(*as_array)


def test_rows_with_the_same_prompt_are_siblings() -> None:
    siblings, number = group_by_prompt(10, np.array([2, 4, 5, 7, 8, 9]), np.array([11, 13, 11, 0, 0, 12]))
    assert number == 2 and siblings.num_groups == 1, "rows without a prompt are nobody's siblings"
    assert siblings.count(hand({2: 7}, [5, 9])).tolist() == [[1], [7], [1]]


def test_what_a_group_has_taken_tells_what_the_rest_of_it_will() -> None:
    #                          0  1  2  3  4  5  6  7  8  9 10
    siblings = PromptGroups(np.array([0, 1, 2, 0, 1, 2, 0, -1, 3, 3, 1]))
    counts = siblings.count(hand({0: 10, 3: 30}, [])) + siblings.count(hand({1: 50}, [2]))
    rows = np.array([4, 5, 6, 7, 8, 9, 10])
    assert siblings.estimate_lengths(rows, counts)[:3].tolist() == [50, np.inf, 20]
    order, num_leaders = siblings.sort(rows, counts)
    assert num_leaders == 1 and order[0] == 8, "of the group that nothing is known of"
    assert order.tolist() == [8, 5, 7, 9, 4, 10, 6], "those that may be as long as any, then the longest first"


def test_at_first_one_of_each_goes() -> None:
    siblings = PromptGroups(np.repeat(np.arange(5), 4))
    order, num_leaders = siblings.sort(np.arange(20), siblings.count(RankState()))
    assert num_leaders == 5 and order[:5].tolist() == [0, 4, 8, 12, 16]
    assert sorted(order) == list(range(20))


def test_a_row_alone_of_its_group_has_nobody_to_tell() -> None:
    siblings = PromptGroups(np.array([0, 0, 1, 1]))
    order, num_leaders = siblings.sort(np.array([1, 2, 3]), siblings.count(RankState()))
    assert (order.tolist(), num_leaders) == ([2, 1, 3], 1)


def test_learning_is_nearly_as_good_as_knowing() -> None:
    model = EngineCostModel(6e-3, 11e-6, 52e-9, max_num_seqs=32)
    num_ranks, group_rows = 8, 16
    num_groups = 16 * num_ranks * model.max_num_seqs // group_rows
    of_group = sample_lengths(str(REPO / "benchmarks" / "reasoning_output_lengths.json"), num_groups)
    random = np.random.default_rng(0)
    lengths = np.repeat(of_group, group_rows) * random.lognormal(0, 0.2, num_groups * group_rows)
    lengths = np.maximum(1, lengths).astype(np.int64)
    siblings, every = PromptGroups(np.repeat(np.arange(num_groups), group_rows)), np.arange(len(lengths))
    orders = {
        "unknown": RowOrder(every),
        "learnt": order_by_measured_lengths(every, siblings, siblings.count(RankState())),
        "known": RowOrder(np.argsort(-lengths, kind="stable")),
    }
    prompts = np.zeros_like(lengths)
    found = {
        name: simulate(model, lengths, prompts, order, num_ranks, WorkConfig()).efficiency
        for name, order in orders.items()
    }
    assert found["unknown"] + 0.5 * (found["known"] - found["unknown"]) < found["learnt"], found


ROWS = [{"prompt": f"prompt {number}", "sample": sample} for number in range(24) for sample in range(12)]


def write(write_config: Callable[..., str], **run: Any) -> str:
    return write_config(
        ROWS,
        # No seeds, so that the made-up engine gives rows with the same prompt the same length.
        run={"seed": None, **run},
        engine={"step_s": 0.01, "max_num_seqs": 4},
        work={"reserve_rows": 2},
    )


@pytest.mark.multi
@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="two ranks"),
        pytest.param(
            ["parallel.launcher=external", "parallel.tensor_parallel_size=2"],
            marks=pytest.mark.slow,
            id="one rank of two processes",
        ),
    ],
)
def test_a_run_deals_anew_when_it_has_learnt(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path, options: list[str]
) -> None:
    rows = ROWS
    job = launcher.dpgen("run", write(write_config), *options, ranks=2)
    assert job.wait() == 0, job.output
    found = load_result(tmp_path / "run")
    assert [(row["prompt"], row["sample"]) for row in found] == [(row["prompt"], row["sample"]) for row in rows]
    assert "longest_first; 24 prompts have several rows each: one of each goes first" in job.output
    assert re.search(r"dealt anew: \d+ rows to begin; .*by what rows with the same prompt have taken", job.output)
    index = index_journal(tmp_path / "run" / "journal")
    assert sorted(index.row) == list(range(len(rows))), "none lost, and none doubled"
    lengths = np.array([row["num_generated_tokens"] for row in found])
    for file in set(index.file.tolist()):  # those that hold rows
        here = index.file == file
        mine = lengths[index.row[here][np.argsort(index.offset[here])]]  # as they were finished
        assert mine[-len(mine) // 4 :].mean() < 0.7 * mine[len(mine) // 2 : -len(mine) // 4].mean(), mine


@pytest.mark.multi
@pytest.mark.slow
def test_a_rank_without_an_engine_deals_with_the_others(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write(write_config, max_engine_deaths=1)
    jobs = launcher.start_like_srun("run", conf, each=[[], ["engine.crash_on=prompt"]])
    assert [job.wait() for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    assert "given up after 1 death in a row" in jobs[1].output
    assert re.search(r"dealt anew: \d+ rows to begin; .*have taken", jobs[0].output), jobs[0].output
    found = load_result(tmp_path / "run")
    assert [row["row_id"] for row in found] == list(range(len(ROWS)))
    assert all(row["error"] is None for row in found)
