"""Run directories on local disks: rank 0 gathers the rows of nodes whose run directory it cannot see."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.jobs import Launcher, WriteConfig, load_result, make_numbered_rows, read_run_json

pytestmark = pytest.mark.multi


def test_rank_0_gathers_all_rows_if_the_run_directory_is_not_shared(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(3000), output={"gather_bytes": 1 << 16})
    run_dirs = [[f"run.dir={tmp_path / f'node{rank}' / 'run'}"] for rank in range(3)]
    jobs = launcher.start_like_srun("run", conf, rank_arguments=run_dirs)
    assert [job.wait() for job in jobs] == [0, 0, 0], jobs[0].output
    results = load_result(tmp_path / "node0" / "run")
    assert [row["row_id"] for row in results] == list(range(3000))
    run = read_run_json(tmp_path / "node0" / "run")
    assert [manifest["sees_rank_0"] for manifest in run["manifests"]] == [True, False, False]
    max_bytes = max(manifest["num_bytes"] for manifest in run["manifests"][1:])
    assert run["gather_rounds"] == -(-max_bytes // ((1 << 16) // 3)), "output.gather_bytes bounds each round"
    assert not (tmp_path / "node1" / "run" / "_SUCCESS").exists()


@pytest.mark.slow
def test_gathering_from_a_shared_run_directory_changes_nothing(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(300), output={"gather_bytes": 1 << 16})
    results, rounds, journals = {}, {}, {}
    for gather in ("auto", "always"):
        run_dir = tmp_path / gather / "run"
        job = launcher.dpgen("run", conf, f"run.dir={run_dir}", f"output.gather={gather}", ranks=2)
        assert job.wait() == 0, job.output
        results[gather] = load_result(run_dir)
        rounds[gather] = read_run_json(run_dir)["gather_rounds"]
        journals[gather] = sorted(path.name for path in (run_dir / "journal").iterdir())
    assert rounds["auto"] == 0 and rounds["always"] > 0
    assert results["always"] == results["auto"]
    assert [row["row_id"] for row in results["always"]] == list(range(300))
    assert journals["always"] == journals["auto"], "no copy of a segment is left beside the original"


@pytest.mark.slow
def test_a_run_directory_of_another_run_on_another_node_is_rejected(
    launcher: Launcher, write_config: WriteConfig, tmp_path: Path
) -> None:
    conf = write_config(make_numbered_rows(20), work={"steal": False})  # so that both nodes generate rows of so few
    run_dirs = [[f"run.dir={tmp_path / f'node{rank}'}"] for rank in range(2)]
    first = launcher.start_like_srun("run", conf, rank_arguments=run_dirs)
    assert [job.wait() for job in first] == [0, 0]
    again = launcher.start_like_srun("run", conf, rank_arguments=run_dirs)
    assert [job.wait() for job in again] == [0, 0], "the run is complete, though rank 1 has no _SUCCESS of its own"
    shutil.rmtree(tmp_path / "node0")
    other = launcher.start_like_srun("run", conf, "sampling.max_tokens=3", rank_arguments=run_dirs)
    assert [job.wait() for job in other] == [2, 2], other[1].output
    assert "sampling.max_tokens: null → 3" in other[0].output + other[1].output
