"""Test lengths measured while running: one row of each prompt goes first, then the others by its length."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import REPO, Launcher, load_result

from dpgen.config.sections import WorkConfig
from dpgen.journal.reader import index_journal
from dpgen.scheduling.groups.prompt_groups import PromptGroups, RankState, group_by_prompt
from dpgen.scheduling.order import RowOrder, order_by_measured_lengths
from dpgen.simulation.lengths import sample_lengths
from dpgen.simulation.simulator import EngineCostModel, Workload, simulate


def make_state(finished: dict[int, int], running: list[int]) -> RankState:
    return RankState(*(np.array(list(values), dtype=np.int64) for values in (finished, finished.values(), running)))


def test_rows_with_the_same_prompt_are_a_group() -> None:
    row_ids, prompt_hashes = np.array([2, 4, 5, 7, 8, 9]), np.array([11, 13, 11, 0, 0, 12])
    prompt_groups, num_grouped = group_by_prompt(10, row_ids, prompt_hashes)
    assert num_grouped == 2 and prompt_groups.num_groups == 1, "rows without a prompt are in no group"
    assert prompt_groups.count(make_state({2: 7}, [5, 9])).tolist() == [[1], [7], [1]]


def test_finished_rows_of_a_group_estimate_the_others() -> None:
    # rows:                                0  1  2  3  4  5  6   7  8  9 10
    prompt_groups = PromptGroups(np.array([0, 1, 2, 0, 1, 2, 0, -1, 3, 3, 1]))
    counts = prompt_groups.count(make_state({0: 10, 3: 30}, [])) + prompt_groups.count(make_state({1: 50}, [2]))
    remaining = np.array([4, 5, 6, 7, 8, 9, 10])
    assert prompt_groups.estimate_lengths(remaining, counts)[:3].tolist() == [50, np.inf, 20]
    order, num_probes = prompt_groups.sort(remaining, counts)
    assert num_probes == 1 and order[0] == 8, "a row of the only group that is not measured"
    assert order.tolist() == [8, 5, 7, 9, 4, 10, 6], "rows that may be as long as any, then the longest first"


def test_at_first_every_group_has_a_probe() -> None:
    prompt_groups = PromptGroups(np.repeat(np.arange(5), 4))
    order, num_probes = prompt_groups.sort(np.arange(20), prompt_groups.count(RankState()))
    assert num_probes == 5 and order[:5].tolist() == [0, 4, 8, 12, 16]
    assert sorted(order) == list(range(20))


def test_the_last_row_of_a_group_is_no_probe() -> None:
    prompt_groups = PromptGroups(np.array([0, 0, 1, 1]))
    order, num_probes = prompt_groups.sort(np.array([1, 2, 3]), prompt_groups.count(RankState()))
    assert (order.tolist(), num_probes) == ([2, 1, 3], 1)


def test_the_reason_tells_what_is_measured() -> None:
    prompt_groups, rows = PromptGroups(np.repeat(np.arange(3), 2)), np.arange(6)
    counts = prompt_groups.count(make_state({0: 12, 2: 900}, [4]))
    assert order_by_measured_lengths(rows[[1, 3, 5]], prompt_groups, counts).reason == (
        "by measured length (min 12, median 456, max 900 tokens), "
        "after 1 row of prompt groups that still run their first rows"
    )
    counts = prompt_groups.count(make_state({}, [4]))
    assert order_by_measured_lengths(rows[[5]], prompt_groups, counts).reason == (
        "by measured length (no prompt group of a remaining row is measured yet)"
    )


def test_measured_lengths_are_nearly_as_good_as_known_ones() -> None:
    model = EngineCostModel(6e-3, 11e-6, 52e-9, max_num_seqs=32)
    num_ranks, group_rows = 8, 16
    num_groups = 16 * num_ranks * model.max_num_seqs // group_rows
    group_lengths = sample_lengths(str(REPO / "benchmarks" / "reasoning_output_lengths.json"), num_groups)
    random = np.random.default_rng(0)
    lengths = np.repeat(group_lengths, group_rows) * random.lognormal(0, 0.2, num_groups * group_rows)
    lengths = np.maximum(1, lengths).astype(np.int64)
    prompt_groups, rows = PromptGroups(np.repeat(np.arange(num_groups), group_rows)), np.arange(len(lengths))
    orders = {
        "unknown": RowOrder(rows),
        "measured": order_by_measured_lengths(rows, prompt_groups, prompt_groups.count(RankState())),
        "known": RowOrder(np.argsort(-lengths, kind="stable")),
    }
    efficiency = {
        name: simulate(model, Workload(lengths, np.zeros_like(lengths), order), num_ranks, WorkConfig()).efficiency
        for name, order in orders.items()
    }
    halfway = (efficiency["unknown"] + efficiency["known"]) / 2
    assert halfway < efficiency["measured"], efficiency


ROWS = [{"prompt": f"prompt {number}", "sample": sample} for number in range(24) for sample in range(12)]


def write(write_config: Callable[..., str], **run: Any) -> str:
    return write_config(
        ROWS,
        # Without seeds the fake engine gives rows with the same prompt the same length.
        run={"seed": None, **run},
        engine={"step_s": 0.01, "max_num_seqs": 4},
        work={"reserve_rows": 2},
    )


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="two ranks"),
        pytest.param(["parallel.launcher=external", "parallel.tensor_parallel_size=2"], id="one rank of two processes"),
    ],
)
def test_a_run_reshards_once_half_of_the_probes_are_finished(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path, options: list[str]
) -> None:
    job = launcher.dpgen("run", write(write_config), *options, ranks=2)
    assert job.wait() == 0, job.output
    result = load_result(tmp_path / "run")
    assert [(row["prompt"], row["sample"]) for row in result] == [(row["prompt"], row["sample"]) for row in ROWS]
    assert (
        "order of work: longest first by measured length (24 probe rows first, one of each unmeasured prompt group)"
        in job.output
    )
    assert re.search(r"resharded \d+ remaining rows: longest first by measured length \(min ", job.output)
    index = index_journal(tmp_path / "run" / "journal")
    assert sorted(index.row) == list(range(len(ROWS))), "none lost, and none doubled"
    lengths = np.array([row["num_generated_tokens"] for row in result])
    for file in set(index.file.tolist()):  # those that hold rows
        in_file = index.file == file
        as_finished = lengths[index.row[in_file][np.argsort(index.offset[in_file])]]
        third_quarter = as_finished[len(as_finished) // 2 : -len(as_finished) // 4]
        last_quarter = as_finished[-len(as_finished) // 4 :]
        assert last_quarter.mean() < 0.7 * third_quarter.mean(), as_finished


@pytest.mark.multi
@pytest.mark.slow
def test_a_rank_without_an_engine_takes_part_in_reshards(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write(write_config, max_engine_deaths=1)
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[[], ["engine.crash_on=prompt"]])
    assert [job.wait() for job in jobs] == [0, 0], "".join(job.output for job in jobs)
    assert "abandoning it after 1 death in a row" in jobs[1].output
    assert re.search(r"resharded \d+ remaining rows: longest first by measured length \(min ", jobs[0].output), jobs[
        0
    ].output
    result = load_result(tmp_path / "run")
    assert [row["row_id"] for row in result] == list(range(len(ROWS)))
    assert all(row["error"] is None for row in result)
