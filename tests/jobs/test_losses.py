"""Ranks that are lost in every phase of a job under srun: the others finish it, in the same attempt."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers.jobs import REPO, Launcher, WriteConfig, make_numbered_rows
from helpers.results import load_all_rows

pytestmark = [pytest.mark.multi, pytest.mark.slow]

GATHER = "dpgen.output.result:gather_segments:before"
SEND = "torch.distributed:send:after"  # rank 0 knows how many bytes to wait for


@pytest.mark.parametrize(
    ("place", "is_shared"),
    [
        pytest.param("dpgen.distributed.gloo.rank_group:GlooGroup._meet:before", True, id="joining"),
        pytest.param("dpgen.distributed.agreement:load_input:before", True, id="reading the input"),
        pytest.param("dpgen.distributed.attempt:shares_run_dir:before", True, id="beginning the attempt"),
        pytest.param("dpgen.scheduling.planner:ShardPlanner._find_remaining_rows:before", True, id="planning"),
        pytest.param("dpgen.engine.starting.loading:ModelLoader._agree_kv_bytes:before", True, id="loading the model"),
        pytest.param(
            "dpgen.engine.starting.loading:ModelLoader._load:after", True, id="waiting for the others' models"
        ),
        pytest.param("dpgen.scheduling.generation_loop:GenerationLoop._count:after", True, id="generating"),
        pytest.param(GATHER, True, id="gathering"),
        pytest.param(GATHER, False, id="gathering, with rows that nobody else has"),
        pytest.param(SEND, False, id="sending rows that nobody else has"),
        pytest.param("dpgen.run:_Job.write:before", True, id="writing"),
    ],
)
def test_a_rank_that_is_killed_in_any_phase_is_done_without(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path, place: str, is_shared: bool
) -> None:
    conf = write_config(make_numbered_rows(60), engine={"max_num_seqs": 4, "step_s": 0.01})
    own = [] if is_shared else [f"run.dir={tmp_path / 'own'}"]
    program = [str(REPO / "tests" / "helpers" / "dying_rank.py"), "SIGKILL", place]
    jobs = launcher.start_like_srun(
        "run", conf, rank_arguments=[[], [], own], rank_programs={2: program}, DPGEN_LEASE_S="8"
    )
    assert [job.wait() for job in jobs] == [0, 0, -signal.SIGKILL], jobs[0].output + jobs[1].output
    rows = load_all_rows(tmp_path / "run", 60)
    assert not [row for row in rows if row["error"]]
    assert "attempt 2" not in jobs[0].output
    is_noticed = "continuing with the remaining ranks" in jobs[0].output
    assert is_noticed == (place != "dpgen.run:_Job.write:before"), jobs[0].output
