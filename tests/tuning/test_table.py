"""The table says what each setting brings, costs and changes; the overlay and the command use the best."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dpgen.tuning.search import Search
from dpgen.tuning.space import MAX_NUM_SEQS, Candidate
from dpgen.tuning.table import format_end, format_table, list_rows, make_command, to_overlay
from dpgen.tuning.trial import Budget, Measurement, TrialResult

BATCHED = "engine.max_num_batched_tokens"


@pytest.fixture
def search() -> Search:
    search = Search(
        {}, 256, Budget(), lambda first: [Candidate({BATCHED: 16384}, 0.5), Candidate({BATCHED: 4096}, 0.4)]
    )
    stages = (
        Measurement(256, 10_000.0, 90.0, 100, 20_000, 9.0),
        Measurement(512, 12_000.0, 80.0, 100, 20_000, 9.0),
        Measurement(1024, 8_000.0, 70.0, 100, 20_000, 9.0, is_loser=True),
    )
    search.propose()
    result = TrialResult(1, {}, stages, 20.0, 60.0, 4000, 1_000_000, 1024, num_tokens=800_000, num_finished=4000)
    search.record(result)
    search.propose()
    search.record(TrialResult(2, {MAX_NUM_SEQS: 512, BATCHED: 16384}, error="CUDA out of memory", wall_s=30.0))
    search.reason = "the budget is used up"
    return search


def test_each_setting_is_a_line_with_what_it_brings(search: Search) -> None:
    head, *lines = format_table(list_rows(search, 256, num_gpus=4), has_gpus=True)
    assert head.split() == ["trial", "settings", "tokens/s", "better", "GPU-hours", "changes"]
    assert [line.split()[:2] for line in lines[:1]] == [["1", "as"]]
    # 1,000,000 rows of 200 tokens at 12,000 tokens/s, and a start of 20 s, on 4 GPUs
    assert lines[1].split() == ["*", "1", f"{MAX_NUM_SEQS}=512", "12,000", "±", "80", "+20.0", "%", "18.54", "numerics"]
    assert "-20.0 %" in lines[2] and lines[2].endswith("stopped early: surely slower")
    assert lines[3].endswith("failed: CUDA out of memory")
    end = list(format_end(search, list_rows(search, 256, num_gpus=4)))
    assert end[-1].startswith("2 trials took 1 min 30 s, and generated 4,000 rows, which are done.")
    assert any(line.startswith("  numerics: ") for line in end)


def test_without_gpus_the_table_has_the_time(search: Search) -> None:
    lines = list(format_table(list_rows(search, 256, num_gpus=0), has_gpus=False))
    assert "time" in lines[0] and "5 h 33 min" in lines[1]


def test_the_overlay_holds_the_best_settings(search: Search) -> None:
    text = to_overlay(search, ["for a model"])
    assert text.startswith("# Written by dpgen tune\n# for a model\n")
    assert yaml.safe_load(text) == {"engine": {"max_num_seqs": 512}}


def test_an_overlay_that_was_tuned_further_keeps_what_the_job_was_measured_with(search: Search, tmp_path: Path) -> None:
    before = {"engine": {"max_num_seqs": 64, "enable_prefix_caching": False}, "parallel": {"engines_per_rank": 2}}
    expected = {**before, "engine": {"max_num_seqs": 512, "enable_prefix_caching": False}}
    assert yaml.safe_load(to_overlay(search, [], before)) == expected
    edited = {"model": "m", "engine": None, MAX_NUM_SEQS: 64}
    assert yaml.safe_load(to_overlay(search, [], edited)) == {"model": "m", "engine": {"max_num_seqs": 512}}
    overlay, found = str(tmp_path / "tuned.yaml"), {MAX_NUM_SEQS: 512}
    command = make_command(["a.yaml", f"{tmp_path}/./tuned.yaml", "data.limit=5"], overlay, found, 1)
    assert command == f"dpgen run a.yaml {overlay} data.limit=5", "once"


def test_a_key_of_the_command_line_does_not_win_over_the_overlay() -> None:
    arguments = ["a.yaml", f"{MAX_NUM_SEQS}=64", "data.limit=5"]
    found = {MAX_NUM_SEQS: 128}
    assert make_command(arguments, "tuned.yaml", found, 1) == "dpgen run a.yaml tuned.yaml data.limit=5"
    section = make_command(["a.yaml", "engine={max_num_seqs: 64}"], "tuned.yaml", found, 1)
    assert section == f"dpgen run a.yaml tuned.yaml 'engine={{max_num_seqs: 64}}' {MAX_NUM_SEQS}=128"
    command = make_command(["my conf.yaml"], "tuned.yaml", {}, 2)
    assert command == "torchrun --nproc-per-node 2 -m dpgen run 'my conf.yaml' tuned.yaml"


def test_a_configuration_whose_path_looks_like_a_value_stands_before_the_overlay(tmp_path: Path) -> None:
    conf = tmp_path / "lr=1.yaml"
    conf.touch()
    assert make_command(["data.limit=5", str(conf)], "tuned.yaml", {}, 1) == f"dpgen run {conf} tuned.yaml data.limit=5"
