"""Engines of several processes or devices: every layout generates the same rows as one process alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import (
    Launcher,
    WriteConfig,
    find_engine_pids,
    list_engine_lines,
    load_result,
    make_numbered_rows,
    wait_for,
    write_into,
)
from helpers.kept_engine import KeptEngine
from helpers.results import count_journal_bytes, load_all_rows
from helpers.tiny_model import ENGINE, save_tiny_moe

from dpgen.config.sections import ParallelConfig
from dpgen.distributed.layout import build_layout
from dpgen.distributed.topology import Topology
from dpgen.errors import ConfigError

EXTERNAL = "parallel.launcher=external"
TP_2 = "parallel.tensor_parallel_size=2"
LOCKSTEP = "parallel.lock_step=true"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


# ---- arithmetic


def test_processes_are_laid_out_as_vllm_numbers_them() -> None:
    parallel = ParallelConfig(launcher="external", tensor_parallel_size=2, pipeline_parallel_size=2)
    layouts = [build_layout(Topology(dp_rank=rank, dp_size=8), parallel) for rank in range(8)]
    assert [layout.is_group_leader for layout in layouts] == [True, False, False, False, True, False, False, False]
    assert {layout.num_engines for layout in layouts} == {2} and {layout.group_size for layout in layouts} == {4}


@pytest.mark.parametrize(("num_started", "advice"), [(3, "start 2 or 4"), (1, "start 2"), (5, "start 4 or 6")])
def test_processes_that_form_no_whole_engines_are_rejected(num_started: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"but the job has {num_started}: {advice}$"):
        build_layout(Topology(dp_size=num_started), ParallelConfig(launcher="external", tensor_parallel_size=2))


def test_engines_whose_experts_are_split_over_ranks_run_in_lockstep() -> None:
    topology = Topology(dp_size=2)
    assert not build_layout(topology, ParallelConfig(launcher="external")).has_shared_engine
    assert build_layout(topology, ParallelConfig(launcher="external", enable_expert_parallel=True)).lockstep
    assert not build_layout(topology, ParallelConfig(enable_expert_parallel=True)).has_shared_engine


# ---- real processes, fake engine


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("options", [[TP_2], [TP_2, LOCKSTEP]], ids=["independent", "lockstep"])
@pytest.mark.parametrize("count", [1, 101])
def test_only_the_first_process_of_a_group_journals(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, options: list[str], count: int
) -> None:
    job = launcher.dpgen("run", write_config(make_numbered_rows(count)), EXTERNAL, *options, ranks=4)
    assert job.wait() == 0, job.output
    load_all_rows(tmp_path / "run", count)
    by_rank = [
        manifest["num_rows"] for manifest in json.loads((tmp_path / "run" / "run.json").read_text())["manifests"]
    ]
    assert by_rank[1] == by_rank[3] == 0 and by_rank[0] + by_rank[2] == count
    assert f"{count} row{'' if count == 1 else 's'} over 2 ranks" in job.output


@pytest.mark.slow
@pytest.mark.multi
def test_the_death_of_one_process_of_an_engine_ends_the_run_resumable(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(100), engine={"step_s": 0.02, "max_num_seqs": 4})
    job = launcher.dpgen("run", conf, EXTERNAL, TP_2, ranks=2, torchrun=["--max-restarts", "1"])
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 1000)
    os.kill(find_engine_pids(job)[1], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert "attempt 2: " in job.output, "torchrun has restarted all ranks"
    load_all_rows(tmp_path / "run", 100)


@pytest.mark.slow
@pytest.mark.multi
def test_a_row_that_kills_engines_in_lockstep_is_recorded_after_restarts_and_all_others_are_generated(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    engine = {"raise_on": "number 7", "max_num_seqs": 1}
    conf = write_config(make_numbered_rows(10), engine=engine, work={"order": "dataset", "reserve_rows": 0})
    job = launcher.dpgen("run", conf, EXTERNAL, LOCKSTEP, ranks=2, torchrun=["--max-restarts", "6"])
    assert job.wait() == 0, job.output
    errors = {row["row_id"]: row["error"] for row in load_all_rows(tmp_path / "run", 10) if row["error"]}
    assert list(errors) == [7] and errors[7]["type"] == "poison_row"
    assert "raised by engine.raise_on='number 7'" in errors[7]["message"]
    assert not list((tmp_path / "run" / "journal").glob(".note-*")), "nothing is left to remember"


# ---- real vLLM


def make_uneven_rows(count: int) -> list[dict[str, Any]]:
    """Return rows with prompts and outputs of different lengths.

    Short ones: at each token, the processes of an engine wait for each other with their cores busy.
    """
    return [{"prompt": " ".join(WORDS[: 1 + row % 9]), "budget": 1 + row * 13 % 16} for row in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, kept_engine: KeptEngine, bos_model: Path) -> list[dict[str, Any]]:
    """Return the rows that one process generates from 41 uneven ones."""
    folder = tmp_path_factory.mktemp("alone")
    kept_engine.run(write_uneven(folder, bos_model))
    return load_result(folder / "run")


def write_uneven(folder: Path, model: Path) -> str:
    return write_into(
        folder,
        make_uneven_rows(41),
        run={"engine": "vllm"},
        model=str(model),
        engine=ENGINE,
        sampling={"temperature": 0, "ignore_eos": True, "from_columns": {"max_tokens": "budget"}},
    )


@pytest.mark.vllm
@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.xdist_group("engines")  # the layouts share the rows of one process alone
@pytest.mark.parametrize(
    ("ranks", "count", "options"),
    [
        pytest.param(2, 41, [TP_2], id="two ranks, TP 2 below each"),
        pytest.param(2, 41, [EXTERNAL, LOCKSTEP], id="DP 2 in lockstep"),
        pytest.param(4, 41, [EXTERNAL, TP_2], id="DP 2 x TP 2 of four processes"),
        # With one row, the other engine has none.
        pytest.param(4, 1, [EXTERNAL, TP_2, LOCKSTEP], id="DP 2 x TP 2 in lockstep, one row"),
    ],
)
def test_every_layout_generates_the_same_rows_as_one_process(
    launcher: Launcher,
    tmp_path: Path,
    bos_model: Path,
    alone: list[dict[str, Any]],
    ranks: int,
    count: int,
    options: list[str],
) -> None:
    job = launcher.dpgen("run", write_uneven(tmp_path, bos_model), f"data.limit={count}", *options, ranks=ranks)
    assert job.wait() == 0, job.output
    assert load_result(tmp_path / "run") == alone[:count]
    assert ("only costs" in job.output) == (LOCKSTEP in options)
    assert not list_engine_lines(job.output), "a user would have to read what vLLM logs"


@pytest.mark.vllm
@pytest.mark.multi
@pytest.mark.slow
def test_experts_split_over_ranks_work_up_to_vllms_communicator_for_the_cpu(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        make_uneven_rows(4),
        run={"engine": "vllm", "log_level": "error"},
        model=str(save_tiny_moe(tmp_path / "model")),
        engine=ENGINE,
    )
    job = launcher.dpgen("run", conf, EXTERNAL, "parallel.enable_expert_parallel=true", ranks=2)
    assert job.wait() == 1, job.output
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "logs").iterdir())
    assert "self.device_communicator.all_gatherv" in logs and "NotImplementedError" in job.output
    assert "only costs" not in job.output
    assert "the engine failed: NotImplementedError" in job.output.splitlines()[-2], "the cause comes last"


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_accepts_pipeline_stages_below_a_rank(launcher: Launcher, bos_model: Path) -> None:
    program = (
        "import sys; from dpgen.engine.messages import EngineSpec; "
        "from dpgen.engine.vllm.vllm_backend import VllmBackend; "
        "print(VllmBackend(EngineSpec('vllm', sys.argv[1], pipeline_parallel_size=2)).check_options())"
    )
    job = launcher.start([launcher.python, "-c", program, str(bos_model)])
    assert job.wait() == 0 and "vLLM on the CPU" in job.output, job.output


@pytest.mark.vllm
@pytest.mark.multi
@pytest.mark.slow
def test_a_mixture_of_experts_generates_the_same_rows_on_one_and_two_independent_engines(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(
        make_uneven_rows(21),
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
