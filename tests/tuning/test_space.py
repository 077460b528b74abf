"""Only settings are tried that fit the job, with what each changes; none is part of the run's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import make_numbered_rows, write_into

from dpgen.config.loader import load_from_args
from dpgen.config.schema import Config
from dpgen.errors import ConfigError
from dpgen.journal.run_identity import compute_run_identity
from dpgen.simulation.hardware import find_batched_tokens
from dpgen.tuning.space import (
    CHANGES,
    ENGINES_PER_RANK,
    MAX_NUM_SEQS,
    Facts,
    check_tunable,
    choose_first_overrides,
    find_changes,
    list_candidates,
    list_engine_options,
)


def make_config(folder: Path, *arguments: str) -> Config:
    return load_from_args([write_into(folder, make_numbered_rows(1), run={"engine": "vllm"}), *arguments])


def list_settings(config: Config, speculative: tuple[str, ...] = (), **facts: Any) -> list[dict[str, Any]]:
    known = {"num_gpus": 1, "has_gpus": True, "max_num_seqs": 256}
    found = Facts(**{**known, "engine_options": list_engine_options("vllm"), **facts})
    return [dict(candidate.overrides) for candidate in list_candidates(config, found, speculative)]


def test_no_setting_is_part_of_what_a_run_is_but_speculative_decoding(tmp_path: Path) -> None:
    values = {"engine.performance_mode": "throughput", "engine.enable_prefix_caching": "false"}
    before = compute_run_identity(make_config(tmp_path), {})
    for key in {*CHANGES} - {ENGINES_PER_RANK, "engine.speculative_config"}:
        assert compute_run_identity(make_config(tmp_path, f"{key}={values.get(key, 2)}"), {}) == before, key
    config = make_config(tmp_path, 'engine.speculative_config={"method": "ngram"}')
    assert compute_run_identity(config, {}) != before
    assert find_changes({"engine.speculative_config": {}, MAX_NUM_SEQS: 4}) == "draws"


def test_more_sequences_are_tried_where_the_largest_number_was_the_best(tmp_path: Path) -> None:
    more = {MAX_NUM_SEQS: 1024}
    assert more in list_settings(make_config(tmp_path), is_largest=True)
    assert more not in list_settings(make_config(tmp_path))
    assert not any(MAX_NUM_SEQS in candidate for candidate in list_settings(make_config(tmp_path), max_num_seqs=1024))


def test_graphs_are_tried_only_where_more_sequences_run_than_vllm_captures(tmp_path: Path) -> None:
    graphs = {"engine.max_cudagraph_capture_size": 1024}
    assert graphs not in list_settings(make_config(tmp_path))
    assert graphs in list_settings(make_config(tmp_path), max_num_seqs=1024)
    eager = make_config(tmp_path, "engine.enforce_eager=true")
    assert graphs not in list_settings(eager, max_num_seqs=1024)
    assert graphs not in list_settings(make_config(tmp_path), max_num_seqs=1024, has_gpus=False)


def test_a_prefix_cache_that_finds_something_stays(tmp_path: Path) -> None:
    off = {"engine.enable_prefix_caching": False}
    assert off in list_settings(make_config(tmp_path), cached_fraction=0.0)
    assert off not in list_settings(make_config(tmp_path), cached_fraction=0.3)


def test_batches_of_more_tokens_come_first_where_prompts_are_most_of_the_work(tmp_path: Path) -> None:
    larger = {"engine.max_num_batched_tokens": 16384}
    assert list_settings(make_config(tmp_path), prompt_fraction=0.9)[0] == larger
    assert list_settings(make_config(tmp_path), prompt_fraction=0.2, num_gpus=2)[0] != larger


@pytest.mark.parametrize(("size", "others"), [(1, [2]), (2, [1, 4]), (4, [2])])
def test_the_gpus_of_the_job_are_divided_in_other_ways(tmp_path: Path, size: int, others: list[int]) -> None:
    key = "parallel.tensor_parallel_size"
    settings = list_settings(make_config(tmp_path, f"{key}={size}"), num_gpus=4)
    assert sorted(candidate[key] for candidate in settings if key in candidate) == others
    assert not any(key in candidate for candidate in list_settings(make_config(tmp_path), has_gpus=False))


def test_no_engine_on_several_gpus_is_tried_where_ranks_share_them(tmp_path: Path) -> None:
    config = make_config(tmp_path, "parallel.share_devices=true")
    assert not any("parallel.tensor_parallel_size" in settings for settings in list_settings(config, num_gpus=2))


def test_an_engine_on_several_gpus_is_tried_though_a_gpu_has_several_engines(tmp_path: Path) -> None:
    config = make_config(tmp_path, f"{ENGINES_PER_RANK}=2")
    [tensor] = [found for found in list_settings(config, num_gpus=2) if "parallel.tensor_parallel_size" in found]
    values = [f"{key}={value}" for key, value in tensor.items()]
    assert make_config(tmp_path, f"{ENGINES_PER_RANK}=2", *values).gpus_per_rank == 2, "it is no contradiction"


def test_other_sizes_of_batches_are_those_beside_the_engines_own(tmp_path: Path) -> None:
    key = "engine.max_num_batched_tokens"
    large, small = [8192, 32768], [4096, 16384]
    for gpu, gib, sizes in (("NVIDIA H200", 140, large), ("NVIDIA new", 96, large), ("NVIDIA A100-80GB", 80, small)):
        settings = list_settings(make_config(tmp_path), batched_tokens=find_batched_tokens(gpu, gib << 30))
        assert sorted(found[key] for found in settings if key in found) == sizes


def test_speculative_decoding_is_tried_only_where_it_is_asked_for(tmp_path: Path) -> None:
    key = "engine.speculative_config"
    assert not any(key in candidate for candidate in list_settings(make_config(tmp_path)))
    methods = [candidate[key]["method"] for candidate in list_settings(make_config(tmp_path), ("ngram", "suffix"))[:2]]
    assert methods == ["ngram", "suffix"]


def test_the_first_engine_can_run_more_sequences_than_are_configured(tmp_path: Path) -> None:
    assert choose_first_overrides(make_config(tmp_path)) == {}, "the engine's default is large"
    assert choose_first_overrides(make_config(tmp_path, "engine.max_num_seqs=64")) == {MAX_NUM_SEQS: 256}
    assert choose_first_overrides(make_config(tmp_path, "engine.max_num_seqs=512")) == {MAX_NUM_SEQS: 1024}
    assert choose_first_overrides(make_config(tmp_path, "engine.max_num_seqs=2048")) == {}


def test_jobs_of_which_no_trial_can_be_made_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.resume=never"):
        check_tunable(make_config(tmp_path, "run.resume=never"))
    with pytest.raises(ConfigError, match=r"parallel\.launcher=external"):
        check_tunable(make_config(tmp_path, "parallel.launcher=external"))
    with pytest.raises(ConfigError, match="task=embed: dpgen tune measures generated tokens"):
        check_tunable(make_config(tmp_path, "task=embed"))
