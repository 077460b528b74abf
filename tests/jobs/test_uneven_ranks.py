"""Ranks of different speed: who generates which row, who waits for whom, and what stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.jobs import Launcher, WriteConfig, load_result, make_numbered_rows, read_run_json

pytestmark = pytest.mark.multi


def read_num_rows(run_dir: Path) -> list[int]:
    """Return the rows that each rank generated."""
    return [manifest["num_rows"] for manifest in read_run_json(run_dir)["manifests"]]


@pytest.mark.slow
def test_a_rank_waits_for_one_that_takes_ten_times_as_long(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(40), work={"steal": False}, sampling={"max_tokens": 10})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[["engine.step_s=0.01"], ["engine.step_s=0.1"]])
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    assert read_num_rows(tmp_path / "run") == [20, 20]


@pytest.mark.slow
def test_a_rank_that_has_finished_its_shard_steals_rows(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(400), sampling={"max_tokens": 4}, engine={"max_num_seqs": 4})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[["engine.step_s=0.002"], ["engine.step_s=0.05"]])
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    fast, slow = read_num_rows(tmp_path / "run")
    assert fast > 300 and fast + slow == 400


@pytest.mark.slow
def test_a_straggler_that_yields_its_last_rows_ends_with_the_fast_rank(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    # More than ten seconds of work: only then is a rank's throughput judged. A row takes 0.4 s and 3 s.
    conf = write_config(make_numbered_rows(600), sampling={"max_tokens": 20}, engine={"max_num_seqs": 8})
    jobs = launcher.start_like_srun("run", conf, rank_arguments=[["engine.step_s=0.02"], ["engine.step_s=0.15"]])
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output
    fast, slow = read_num_rows(tmp_path / "run")
    assert fast > 400 and fast + slow == 600
    assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(600))


@pytest.mark.slow
def test_a_row_has_the_sampling_of_its_shard_on_whichever_rank_it_is_generated(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    rows = [{**row, "budget": 9 if index in (4, 7) else None} for index, row in enumerate(make_numbered_rows(200))]
    conf = write_config(
        rows,
        sampling={"max_tokens": 2, "from_columns": {"max_tokens": "budget"}},
        sampling_by_rank=[{"max_tokens": 3}, {"max_tokens": 5}, {"temperature": 0.5}],
        engine={"max_num_seqs": 4},
        work={"claim_rows": 4, "reserve_rows": 0},
    )
    results, num_rows = {}, {}
    for ranks, steps_s in {1: ["0"], 2: ["0.002", "0.05"], 3: ["0.002", "0.05", "0.002"]}.items():
        run_dir = tmp_path / str(ranks) / "run"
        speeds = [[f"engine.step_s={step_s}"] for step_s in steps_s]
        jobs = launcher.start_like_srun("run", conf, f"run.dir={run_dir}", rank_arguments=speeds)
        assert [job.wait() for job in jobs] == [0] * ranks, jobs[0].output
        results[ranks] = load_result(run_dir)
        num_rows[ranks] = read_num_rows(run_dir)
    assert num_rows[2][1] < 100 and num_rows[3][1] < 67, "other ranks generate rows of the slow rank's shard, too"
    assert results[2] == results[1] and results[3] == results[1]
    expected = [row["budget"] or (3, 5, 2)[index % 3] for index, row in enumerate(rows)]
    assert [row["num_generated_tokens"] for row in results[1]] == expected
