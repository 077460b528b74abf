"""The estimate of a run: from the fake engine's options, the model's size and the GPU, or an earlier run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import write_into
from helpers.tiny_tokenizers import save_model_without_weights

from dpgen.config.loader import load
from dpgen.data.model_facts import ModelSize
from dpgen.errors import ConfigError
from dpgen.journal.writer import JournalWriter
from dpgen.monitoring.earlier_run import EarlierRun, find_earlier_run, read_earlier_run
from dpgen.monitoring.preview import PreviewOptions, build_preview
from dpgen.records import Completion, RowError, RowResult
from dpgen.simulation import hardware, reference
from dpgen.simulation.estimate import Estimate, EstimateOptions, estimate_run
from dpgen.simulation.hardware import REFERENCE_GPU, estimate_cost_model, find_gpu, read_gpu_name

REFERENCE_SIZE = ModelSize(8.03e9, reference.NUM_ACTIVE_PARAMS, reference.WEIGHT_BYTES, reference.KV_BYTES)


def estimate(
    folder: Path, options: EstimateOptions | None = None, *, num_rows: int = 40, num_ranks: int = 1, **sections: Any
) -> Estimate:
    rows = [{"prompt": "x" * 10, "answer": "yes"} for _ in range(num_rows)]
    config = load([write_into(folder, rows, **sections)], [])
    preview, examined, model_config = build_preview(config, PreviewOptions(num_ranks=num_ranks))
    found = estimate_run(config, preview, examined, model_config, options or EstimateOptions())
    assert found is not None
    return found


def estimate_vllm(folder: Path, options: EstimateOptions | None = None, **sections: Any) -> Estimate:
    model = save_model_without_weights(folder / "model")
    return estimate(folder, options, run={"engine": "vllm"}, model=str(model), **sections)


def make_earlier(**changes: Any) -> EarlierRun:
    measured = {"busy_s": (10.0,), "num_rows": (100,), "num_prompt_tokens": (1_000,), "num_generated_tokens": (5_000,)}
    limits = {"max_num_seqs": 32, "kv_tokens": 10_000}
    fields = {
        "path": Path("runs/a"),
        "model": "none",
        "num_done": 100,
        "lengths": np.full(50, 50),
        **measured,
        **limits,
    }
    return EarlierRun(**{**fields, **changes})


# ---- the fake engine, whose steps have a known length


@pytest.mark.parametrize(("num_ranks", "wall_s"), [(1, 3.0), (2, 2.0)])
def test_the_fake_engine_takes_a_step_for_each_token_of_a_full_batch(
    num_ranks: int, wall_s: float, tmp_path: Path
) -> None:
    sections = {"engine": {"step_s": 0.1, "max_num_seqs": 16}, "sampling": {"max_tokens": 10}}
    found = estimate(tmp_path, num_ranks=num_ranks, **sections)
    assert found.wall_s == pytest.approx(wall_s, abs=0.01)
    assert (found.num_prompt_tokens, found.num_generated_tokens) == (400, 400)
    assert (found.num_gpus, found.gpu_hours, found.is_rough) == (0, 0, False)


def test_samples_count_as_sequences(tmp_path: Path) -> None:
    found = estimate(tmp_path, sampling={"n": 4, "max_tokens": 10})
    assert found.num_generated_tokens == found.max_generated_tokens == 1_600


def test_a_part_of_many_rows_is_simulated_and_the_rest_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"engine": {"step_s": 0.1, "max_num_seqs": 16}, "sampling": {"max_tokens": 10}}
    whole = estimate(tmp_path, num_rows=1_600, **sections)
    monkeypatch.setattr("dpgen.simulation.estimate._MAX_SIMULATED", 160)
    part = estimate(tmp_path, num_rows=1_600, **sections)
    assert part.wall_s == pytest.approx(whole.wall_s, rel=0.02)
    assert part.num_generated_tokens == whole.num_generated_tokens == 16_000


def test_without_a_sound_row_there_is_no_estimate(tmp_path: Path) -> None:
    config = load([write_into(tmp_path, [{"prompt": None}])], [])
    assert estimate_run(config, *build_preview(config, PreviewOptions()), EstimateOptions()) is None


# ---- lengths


def test_lengths_are_assumed_and_said_to_be_unless_something_tells_them(tmp_path: Path) -> None:
    engine = {"max_model_len": 1_000}
    assumed = estimate(tmp_path, engine=engine)
    assert assumed.num_generated_tokens == 40 * 256 and assumed.lengths_source.startswith("assumed: 256 tokens")
    assert assumed.max_generated_tokens == 40 * 990
    given = estimate(tmp_path, EstimateOptions(lengths="constant:7"), engine=engine)
    assert given.num_generated_tokens == 40 * 7 and given.lengths_source == "--lengths=constant:7"
    earlier = estimate(tmp_path, EstimateOptions(earlier=make_earlier()), engine=engine)
    assert earlier.num_generated_tokens == 40 * 50 and earlier.lengths_source == "as in runs/a"


def test_given_completions_are_not_generated(tmp_path: Path) -> None:
    found = estimate(tmp_path, data={"completion_column": "answer"})
    assert found.num_generated_tokens == 40 and "only read" in found.lengths_source


# ---- the model's size and the GPU's name


def test_the_measured_engine_is_estimated_as_it_was_measured() -> None:
    model = estimate_cost_model(REFERENCE_SIZE, REFERENCE_GPU, 1, {"max_num_seqs": 256})
    assert model.step_s == pytest.approx(0.006) and model.seq_s == pytest.approx(11e-6)
    assert model.kv_s == pytest.approx(52e-9) and model.prefill_s == pytest.approx(23e-6)
    assert model.max_num_seqs == 256 and model.kv_tokens is not None and 350_000 < model.kv_tokens < 450_000


def test_more_gpus_or_a_faster_one_or_a_smaller_model_take_less_time() -> None:
    costs = [
        estimate_cost_model(size, gpu, num_gpus, {}).step_s
        for size, gpu, num_gpus in (
            (REFERENCE_SIZE, REFERENCE_GPU, 1),
            (REFERENCE_SIZE, find_gpu("H200"), 1),
            (REFERENCE_SIZE, REFERENCE_GPU, 2),
            (dataclasses.replace(REFERENCE_SIZE, weight_bytes=8e9), REFERENCE_GPU, 1),
        )
        if gpu is not None
    ]
    assert len(costs) == 4 and all(cost < costs[0] for cost in costs[1:])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100"),
        ("Voodoo 2", None),
    ],
)
def test_gpus_are_known_by_their_drivers_names(name: str, expected: str | None) -> None:
    gpu = find_gpu(name)
    assert (None if gpu is None else gpu.name) == expected


def test_the_gpu_s_name_is_read_without_cuda(tmp_path: Path) -> None:
    assert read_gpu_name(tmp_path) is None
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 5\n")
    assert read_gpu_name(tmp_path) == "NVIDIA H100 80GB HBM3"


def test_an_estimate_by_size_and_name_is_rough_and_says_for_which_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpgen.simulation.estimate.read_gpu_name", lambda: None)
    found = estimate_vllm(tmp_path)
    assert found.is_rough and "on 1 x H100, by their size and name" in found.engine_source
    assert found.notes == ["no GPU is found here, so the estimate is for H100: name another with --gpu"]
    named = estimate_vllm(tmp_path, EstimateOptions(gpu="A100"), parallel={"tensor_parallel_size": 2})
    assert "on 2 x A100" in named.engine_source and named.num_gpus == 2 and not named.notes
    assert named.gpu_hours == pytest.approx(2 * named.wall_s / 3600, abs=1e-3)
    with pytest.raises(ConfigError, match="--gpu=Voodoo: must be one of GB200"):
        estimate_vllm(tmp_path, EstimateOptions(gpu="Voodoo"))


def test_weights_that_do_not_fit_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = dataclasses.replace(REFERENCE_SIZE, weight_bytes=140e9)
    monkeypatch.setattr("dpgen.simulation.estimate.estimate_model_size", lambda *_: large)
    found = estimate_vllm(tmp_path, EstimateOptions(gpu="H100"))
    assert found.notes == [
        "the weights (140 GB) do not fit in 1 x H100 of 80 GB: set a larger parallel.tensor_parallel_size"
    ]


# ---- an earlier run


def test_an_earlier_run_s_measurements_replace_the_rough_ones(tmp_path: Path) -> None:
    """Rows like those of the earlier run take as long as they took then."""
    earlier = make_earlier(model=str(tmp_path / "model"), num_rows=(40,), num_prompt_tokens=(400,))
    earlier = dataclasses.replace(earlier, num_generated_tokens=(40 * 50,))
    found = estimate_vllm(tmp_path, EstimateOptions(gpu="H100", earlier=earlier), data={"limit": 40})
    assert found.wall_s == pytest.approx(10.0, rel=0.02)
    assert (found.engine.max_num_seqs, found.engine.kv_tokens) == (32, 10_000)
    assert found.engine_source == "measured in runs/a" and not found.is_rough and not found.notes


def test_another_model_s_measurements_are_rough(tmp_path: Path) -> None:
    found = estimate_vllm(tmp_path, EstimateOptions(gpu="H100", earlier=make_earlier(model="other")))
    assert found.is_rough and found.notes == ["runs/a ran another model (other), so that its speed says little"]


def test_a_run_directory_is_read_finished_or_not(tmp_path: Path) -> None:
    assert read_earlier_run(str(tmp_path / "nowhere")) is None
    (tmp_path / "journal").mkdir()
    journal = JournalWriter(tmp_path / "journal", 1, 0)
    completions = (Completion("a", "stop", 3), Completion("b", "stop", 5))
    journal.append(RowResult(0, 7, completions))
    journal.append(RowResult(1, error=RowError("wrong_type", "no")))
    journal.close()
    assert read_earlier_run(str(tmp_path)) is None, "without run.json nothing tells which run it is"
    (tmp_path / "run.json").write_text(json.dumps({"identity": {"model": "m"}}))
    half = read_earlier_run(str(tmp_path))
    assert half is not None
    assert (half.model, half.num_done, half.lengths.tolist(), half.samples_per_row) == ("m", 2, [3, 5], 2.0)
    assert half.num_ranks == 0 and half.max_num_seqs is None
    rank = {"busy_s": 2.5, "num_rows": 2, "num_prompt_tokens": 7, "num_generated_tokens": 8}
    engine = {"max_num_seqs": 16, "num_kv_blocks": 10, "kv_block_tokens": 16}
    whole = {"identity": {"model": "m"}, "manifests": [rank, {**rank, "busy_s": 0.0}], "engine": engine}
    (tmp_path / "run.json").write_text(json.dumps(whole))
    found = find_earlier_run("elsewhere", str(tmp_path))
    assert found is not None and found.busy_s == (2.5,)
    assert (found.max_num_seqs, found.kv_tokens) == (16, 160)


def test_the_table_of_gpus_names_none_twice() -> None:
    names = [gpu.name for gpu in hardware.GPUS]
    assert len(names) == len(set(names)) and all(find_gpu(name) is not None for name in names)
