"""Engines made of several processes or devices: every layout generates what one process does alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import Launcher, find_engine_pids, load_result, make_numbered_rows, wait_for, write_into
from helpers.tiny_model import ENGINE, save_tiny_model, save_tiny_moe

from dpgen.config.schema import ParallelConfig
from dpgen.distributed.layout import build_layout
from dpgen.distributed.topology import Topology
from dpgen.errors import ConfigError

EXTERNAL = "parallel.launcher=external"
TP_2 = "parallel.tensor_parallel_size=2"
LOCK_STEP = "parallel.lock_step=true"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


# ---- arithmetic


def test_processes_are_laid_out_as_vllm_numbers_them() -> None:
    parallel = ParallelConfig(launcher="external", tensor_parallel_size=2, pipeline_parallel_size=2)
    found = [build_layout(Topology(dp_rank=rank, dp_size=8), parallel) for rank in range(8)]
    assert [each.is_group_leader for each in found] == [True, False, False, False, True, False, False, False]
    assert {each.num_engines for each in found} == {2} and {each.group_size for each in found} == {4}


@pytest.mark.parametrize(("started", "advice"), [(3, "start 2 or 4"), (1, "start 2 or 2"), (5, "start 4 or 6")])
def test_processes_that_make_no_whole_engines_are_refused(started: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"and {started} are here: {advice}"):
        build_layout(Topology(dp_size=started), ParallelConfig(launcher="external", tensor_parallel_size=2))


def test_experts_that_are_split_over_ranks_step_together() -> None:
    topology = Topology(dp_size=2)
    assert not build_layout(topology, ParallelConfig(launcher="external")).has_shared_engine
    assert build_layout(topology, ParallelConfig(launcher="external", enable_expert_parallel=True)).lockstep
    assert not build_layout(topology, ParallelConfig(enable_expert_parallel=True)).has_shared_engine


# ---- real processes, made-up text


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("options", [[TP_2], [TP_2, LOCK_STEP]], ids=["independent", "lock-step"])
@pytest.mark.parametrize("count", [1, 101])
def test_only_the_first_process_of_a_group_journals(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path, options: list[str], count: int
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(count)), EXTERNAL, *options, ranks=4)
    assert job.wait() == 0, job.output
    assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(count))
    by_rank = [each["num_rows"] for each in json.loads((tmp_path / "run" / "run.json").read_text())["manifests"]]
    assert by_rank[1] == by_rank[3] == 0 and by_rank[0] + by_rank[2] == count
    assert f"{count} row{'' if count == 1 else 's'} over 2 ranks" in job.output


@pytest.mark.slow
@pytest.mark.multi
def test_an_engine_of_several_that_dies_ends_the_run_resumable(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(100), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, EXTERNAL, TP_2, ranks=2, torchrun=["--max-restarts", "1"])
    journal = tmp_path / "run" / "journal"
    wait_for(lambda: sum(path.stat().st_size for path in journal.glob("*.journal")) > 1000)
    os.kill(find_engine_pids(job)[1], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert "attempt 2: " in job.output, "torchrun has started all of them anew"
    assert [row["row_id"] for row in load_result(tmp_path / "run")] == list(range(100))


# ---- real vLLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def uneven(count: int) -> list[dict[str, Any]]:
    return [{"prompt": " ".join(WORDS[: 1 + row % 9]), "budget": 1 + row * 13 % 40} for row in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[dict[str, Any]]:
    """What one process generates from 41 uneven rows."""
    folder = tmp_path_factory.mktemp("alone")
    launcher = Launcher(folder)
    job = launcher.dpgen("run", write_uneven(folder, model))
    try:
        assert job.wait() == 0, job.output
    finally:
        job.end()
    return load_result(folder / "run")


def write_uneven(folder: Path, model: Path) -> str:
    return write_into(
        folder,
        uneven(41),
        run={"engine": "vllm", "log_level": "error"},
        model=str(model),
        engine=ENGINE,
        sampling={"temperature": 0, "ignore_eos": True, "from_columns": {"max_tokens": "budget"}},
    )


@pytest.mark.vllm
@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.xdist_group("layouts")  # they share what one process generates alone
@pytest.mark.parametrize(
    ("ranks", "count", "options"),
    [
        pytest.param(2, 41, [TP_2], id="two ranks, TP 2 below each"),
        pytest.param(2, 1, [TP_2], id="two ranks, TP 2 below each, one row"),
        pytest.param(2, 41, [EXTERNAL, TP_2], id="TP 2 of two processes"),
        pytest.param(2, 1, [EXTERNAL, TP_2], id="TP 2 of two processes, one row"),
        pytest.param(2, 41, [EXTERNAL, LOCK_STEP], id="DP 2 in lock-step"),
        pytest.param(2, 1, [EXTERNAL, LOCK_STEP], id="DP 2 in lock-step, one row"),
        pytest.param(4, 41, [EXTERNAL, TP_2], id="DP 2 x TP 2 of four processes"),
        pytest.param(4, 1, [EXTERNAL, TP_2], id="DP 2 x TP 2 of four processes, one row"),
        pytest.param(4, 1, [EXTERNAL, TP_2, LOCK_STEP], id="DP 2 x TP 2 in lock-step, one row"),
    ],
)
def test_every_layout_generates_what_one_process_does(
    launcher: Launcher,
    tmp_path: Path,
    model: Path,
    alone: list[dict[str, Any]],
    ranks: int,
    count: int,
    options: list[str],
) -> None:
    job = launcher.dpgen("run", write_uneven(tmp_path, model), f"data.limit={count}", *options, ranks=ranks)
    assert job.wait() == 0, job.output
    assert load_result(tmp_path / "run") == alone[:count]
    assert ("only costs" in job.output) == (LOCK_STEP in options)


@pytest.mark.vllm
@pytest.mark.multi
@pytest.mark.slow
def test_experts_split_over_ranks_get_as_far_as_vllms_communicator_for_the_cpu(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write_config(
        uneven(4),
        run={"engine": "vllm", "log_level": "error"},
        model=str(save_tiny_moe(tmp_path / "model")),
        engine=ENGINE,
    )
    job = launcher.dpgen("run", conf, EXTERNAL, "parallel.enable_expert_parallel=true", ranks=2)
    assert job.wait() == 1, job.output
    assert "self.device_communicator.all_gatherv" in job.output and "NotImplementedError" in job.output
    assert "only costs" not in job.output
    assert "the engine failed: NotImplementedError" in job.output.splitlines()[-2], "the last word is the cause"


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_takes_pipeline_stages_below_a_rank(launcher: Launcher, tmp_path: Path, model: Path) -> None:
    program = (
        "import sys; from dpgen.engine.messages import EngineSpec; from dpgen.engine.vllm_backend import VllmBackend; "
        "print(VllmBackend(EngineSpec('vllm', sys.argv[1], pipeline_parallel_size=2)).check())"
    )
    job = launcher.start([launcher.python, "-c", program, str(model)])
    assert job.wait() == 0 and "vLLM on the CPU" in job.output, job.output


@pytest.mark.vllm
@pytest.mark.multi
@pytest.mark.slow
def test_a_mixture_of_experts_in_engines_of_their_own(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write_config(
        uneven(21),
        run={"engine": "vllm", "log_level": "error"},
        model=str(save_tiny_moe(tmp_path / "model")),
        engine=ENGINE,
        sampling={"temperature": 0, "ignore_eos": True, "from_columns": {"max_tokens": "budget"}},
    )
    results = []
    for ranks in (1, 2):
        job = launcher.dpgen("run", conf, f"run.dir={tmp_path / str(ranks) / 'run'}", ranks=ranks)
        assert job.wait() == 0, job.output
        results.append(load_result(tmp_path / str(ranks) / "run"))
    assert results[0] == results[1] and len(results[0]) == 21
    assert not any(row["error"] for row in results[0])
