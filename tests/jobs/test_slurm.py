"""Run the shipped sbatch scripts on a real SLURM of two nodes: complete runs, and runs that are stopped on the way.

If SLURM can't be started here, the tests are skipped; with DPGEN_REQUIRE_SLURM or CI set they fail instead.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO, SHORT_LEASE, Launcher, WriteConfig, load_result, make_numbered_rows, write_into
from helpers.requirements import skip_or_fail
from helpers.results import count_journal_bytes, load_all_rows, run_undisturbed
from helpers.slurm_cluster import Cluster, SlurmJob, find_missing_requirement
from helpers.tiny_model import ENGINE, save_tiny_model

from dpgen.distributed.ports import bind_first_free, derive_job_ports

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.multi,
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),  # there is one cluster
]

SCRIPTS = ["slurm.sbatch", "slurm_torchrun.sbatch"]
SLOW = {"step_s": 0.4, "max_num_seqs": 1}  # minutes in all: no test waits until such a run ends
FAST = {"step_s": 0.0, "max_num_seqs": 2}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = find_missing_requirement()
    if reason is not None:
        skip_or_fail(reason, "DPGEN_REQUIRE_SLURM", "CI")
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture
def write(write_config: WriteConfig, tmp_path: Path) -> Callable[[str, dict[str, Any]], str]:
    """Write the configuration of one of several runs over the same 60 rows: NAME.yaml, with run directory NAME/run."""

    def config(name: str, engine: dict[str, Any]) -> str:
        return write_config(
            make_numbered_rows(60), f"{name}.yaml", run={"dir": str(tmp_path / name / "run")}, engine=engine
        )

    return config


class RealRuns:
    """Configure runs on real vLLM over the same rows: NAME/conf.yaml, with run directory NAME/run.

    The fewer `max_num_seqs`, the slower the run.
    """

    NUM_ROWS = 400

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model = save_tiny_model(folder / "model")
        self._expected: list[dict[str, Any]] = []

    def write(self, folder: Path, max_num_seqs: int) -> str:
        folder.mkdir(exist_ok=True)
        return write_into(
            folder,
            make_numbered_rows(self.NUM_ROWS),
            run={"engine": "vllm", "log_level": "error"},
            model=str(self._model),
            engine={**ENGINE, "max_num_seqs": max_num_seqs},
            sampling={"temperature": 0, "ignore_eos": True, "max_tokens": 200},
        )

    def expected(self) -> list[dict[str, Any]]:
        """Return the rows of an undisturbed run."""
        if not self._expected:
            launcher = Launcher(self.folder)
            job = launcher.dpgen("run", self.write(self.folder / "undisturbed", 32))
            try:
                assert job.wait(400) == 0, job.output
            finally:
                job.end()
            self._expected = results(self.folder, "undisturbed", self.NUM_ROWS)
        return self._expected


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealRuns:
    return RealRuns(tmp_path_factory.mktemp("real"))


def results(tmp_path: Path, name: str, count: int = 60) -> list[dict[str, Any]]:
    """Return the rows of a finished run, after checking that each is there once, in order, without an error."""
    rows = load_all_rows(tmp_path / name / "run", count)
    assert all(row["error"] is None for row in rows)
    return rows


def undisturbed(launcher: Launcher, conf: str, tmp_path: Path) -> list[dict[str, Any]]:
    """Return the rows of an undisturbed run with the same configuration."""
    run_undisturbed(launcher, conf, tmp_path / "undisturbed" / "run")
    return results(tmp_path, "undisturbed")


def is_generating(tmp_path: Path, name: str) -> bool:
    """Return True once the journals hold rows."""
    return count_journal_bytes(tmp_path / name / "run") > 400


# ---- complete runs


@pytest.mark.vllm
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_complete_run_on_two_nodes_with_a_real_engine(cluster: Cluster, tmp_path: Path, script: str) -> None:
    """Another process has taken the first port on which the ranks, or their torchruns, would meet."""
    paths = [f"model={REPO / 'conf/demo/model'}", f"data.path={REPO / 'conf/demo/questions.jsonl'}"]
    run_dir = tmp_path / "demo" / "run"
    arguments = [str(REPO / "conf/demo.yaml"), *paths, "data.limit=64", f"run.dir={run_dir}"]
    job = SlurmJob.submit(cluster, tmp_path, script, *arguments, options=["--hold"])
    with bind_first_free(derive_job_ports(int(job.id), 0)):  # a listener that never answers
        cluster.run("scontrol", "release", job.id)
        assert job.wait() == "COMPLETED", job.output
    questions = (REPO / "conf/demo/questions.jsonl").read_text().splitlines()[:64]
    rows = load_result(run_dir)
    assert [row["question"] for row in rows] == [json.loads(line)["question"] for line in questions]
    is_correct = [str(row["answer"]).split()[-1] in (row["generated_text"] or "") for row in rows]
    assert sum(is_correct) >= 60, "the demo's model can add"
    assert "2 ranks" in job.output and "dpgen: the run is complete" in job.output
    assert job.num_restarts == 0


@pytest.mark.parametrize("options", [[], ["--torchrun"]])
def test_dpgen_slurm_submits_a_script_that_runs_unchanged(
    cluster: Cluster,
    write: Callable[..., str],
    launcher: Launcher,
    tmp_path: Path,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    conf = write("run", FAST)
    arguments = ["slurm", Path(conf).name, "work.claim_rows=8", "--nodes", "2", "--ntasks-per-node", "2", *options]
    printed = cluster.run(launcher.python, "-m", "dpgen", *arguments, "--submit", folder=tmp_path)
    assert printed.startswith("Submitted batch job ")
    job = SlurmJob(cluster, tmp_path, printed.split()[-1])
    assert job.wait() == "COMPLETED", job.output
    assert "60 rows over 4 ranks" in job.output
    results(tmp_path, "run")
    assert len(list(job.attempt(0).glob("*.log"))) == (2 if options else 4)


# ---- runs that are stopped, and resume


@pytest.mark.vllm
def test_runs_stopped_by_a_time_limit_are_requeued_until_they_are_complete(
    cluster: Cluster, write: Callable[..., str], real: RealRuns, launcher: Launcher, tmp_path: Path
) -> None:
    """Four jobs at once, since SLURM counts in minutes: both scripts, one without a usable --signal, and real vLLM.

    Their time limit is shortened once they generate, so a busy machine, which starts slowly, does not matter.
    """
    warnings = {"slurm.sbatch": "USR1@20", "slurm_torchrun.sbatch": "TERM@20", "real": "USR1@20"}
    warnings["unwarned"] = "CONT@20"  # SIGCONT does nothing, so this job runs until SLURM ends it
    jobs = {}
    for name, warning in warnings.items():
        script = name if name.endswith(".sbatch") else "slurm.sbatch"
        conf = real.write(tmp_path / name, 1) if name == "real" else write(name, SLOW)
        options = ["--time=20", f"--signal={warning}"]
        jobs[name] = SlurmJob.submit(cluster, tmp_path, script, conf, options=options)
    for name, job in jobs.items():
        job.wait_for(lambda name=name: is_generating(tmp_path, name))
    for job in jobs.values():
        job.limit(35)
    for name, job in jobs.items():
        job.wait_for((job.attempt(0) / "status").exists, timeout_s=180)
        if name != "real":
            write(name, FAST)
            continue
        real.write(tmp_path / name, 32)
        job.wait_for(lambda job=job: job.num_restarts == 1)
        # Time to load its model again and finish, unless it has finished by now.
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=20", check=False)
    expected = dict.fromkeys(warnings, undisturbed(launcher, write("expected", FAST), tmp_path))
    expected["real"] = real.expected()
    for name, job in jobs.items():
        assert job.wait() == "COMPLETED", job.output
        assert job.num_restarts == 1, job.output
        status, num_done = (job.attempt(0) / "status").read_text().split()
        assert status == "75" and 0 < int(num_done) < len(expected[name])
        assert f"Requeueing job {job.id}" in job.output
        assert results(tmp_path, name, len(expected[name])) == expected[name]


def test_a_preempted_run_is_requeued_and_completes(
    cluster: Cluster, write: Callable[..., str], launcher: Launcher, tmp_path: Path
) -> None:
    options = ["--partition=low", "--exclusive"]
    job = SlurmJob.submit(cluster, tmp_path, "slurm.sbatch", write("run", SLOW), options=options)
    job.wait_for(lambda: is_generating(tmp_path, "run"))
    text = "#!/bin/sh\nexit 0\n"
    cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", text=text)
    job.wait_for((job.attempt(0) / "status").exists)
    conf = write("run", FAST)
    assert job.wait() == "COMPLETED", job.output
    assert job.num_restarts == 1, job.output
    assert results(tmp_path, "run") == undisturbed(launcher, conf, tmp_path)


@pytest.mark.vllm
def test_a_run_continues_without_a_lost_node_under_srun_and_is_requeued_under_torchrun(
    cluster: Cluster, write: Callable[..., str], real: RealRuns, launcher: Launcher, tmp_path: Path
) -> None:
    """The job under srun has real vLLM."""
    confs = {"slurm.sbatch": real.write(tmp_path / "slurm.sbatch", 4)}
    confs["slurm_torchrun.sbatch"] = write("slurm_torchrun.sbatch", SLOW)  # still at work once vLLM is, on any machine
    jobs = {script: SlurmJob.submit(cluster, tmp_path, script, conf, **SHORT_LEASE) for script, conf in confs.items()}
    srun, torchrun = jobs.values()
    for script, job in reversed(jobs.items()):  # on a quiet machine vLLM takes some 20 s for its rows, so it comes last
        job.wait_for(lambda script=script: is_generating(tmp_path, script))
    conf = write("slurm_torchrun.sbatch", FAST)  # for the attempt after the requeue
    cluster.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    torchrun.wait_for(lambda: torchrun.num_restarts == 1)  # SLURM's own requeueing
    srun.wait_for(lambda: "continuing with the remaining ranks" in srun.output)
    cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME", check=False)  # the node may be back already
    assert torchrun.wait() == "COMPLETED", torchrun.output
    assert srun.wait() == "COMPLETED", srun.output
    assert srun.num_restarts == 0
    assert results(tmp_path, "slurm_torchrun.sbatch") == undisturbed(launcher, conf, tmp_path)
    assert results(tmp_path, "slurm.sbatch", real.NUM_ROWS) == real.expected()


def test_a_run_continues_without_a_killed_task_and_completes(
    cluster: Cluster, write: Callable[..., str], launcher: Launcher, tmp_path: Path
) -> None:
    conf = write("run", {"step_s": 0.1, "max_num_seqs": 2})  # half a minute for the rank that is left
    job = SlurmJob.submit(cluster, tmp_path, "slurm.sbatch", conf, **SHORT_LEASE)
    job.wait_for(lambda: is_generating(tmp_path, "run"))
    os.kill(job.rank_pid(1), signal.SIGKILL)
    assert job.wait() == "COMPLETED", job.output
    assert "task 1: Killed" in job.output and "continuing with the remaining ranks" in job.output
    assert "2 ranks" in job.output and "dpgen: the run is complete" in job.output
    assert job.num_restarts == 0
    assert results(tmp_path, "run") == undisturbed(launcher, write("expected", FAST), tmp_path)


# ---- runs that must not be requeued


def test_cancelled_runs_stay_cancelled_and_can_be_resumed_by_hand(
    cluster: Cluster, write: Callable[..., str], launcher: Launcher, tmp_path: Path
) -> None:
    jobs = {script: SlurmJob.submit(cluster, tmp_path, script, write(script, SLOW)) for script in SCRIPTS}
    for script, job in jobs.items():
        job.wait_for(lambda script=script: is_generating(tmp_path, script))
        cluster.run("scancel", job.id)
    for job in jobs.values():
        assert job.wait() == "CANCELLED", job.output
        assert "Not requeued: SLURM is ending the job" in job.output
    expected = undisturbed(launcher, write("expected", FAST), tmp_path)
    for script in SCRIPTS:
        resumed = launcher.dpgen("run", write(script, FAST))
        assert resumed.wait() == 0, resumed.output
        assert "attempt 2: " in resumed.output and "attempt 2: 0 of" not in resumed.output
        assert results(tmp_path, script) == expected


def test_runs_that_fail_are_not_requeued(cluster: Cluster, write: Callable[..., str], tmp_path: Path) -> None:
    jobs = {}
    for script in SCRIPTS:
        for fault, expected in (("engine.nonsense=1", "2:0"), ("engine.load_error=broken", "1:0")):
            conf = write(f"{script}-{expected[0]}", FAST)
            job = SlurmJob.submit(cluster, tmp_path, script, conf, fault, DPGEN_MAX_RESTARTS="0")
            jobs[job] = expected
    assert [job.wait() for job in jobs] == ["FAILED"] * 4
    assert [job.describe()["ExitCode"] for job in jobs] == list(jobs.values())
    assert [job.num_restarts for job in jobs] == [0] * 4
    assert all("the run failed and is not requeued" in job.output for job in jobs)


def test_a_run_without_progress_is_not_requeued_for_ever(
    cluster: Cluster, write: Callable[..., str], tmp_path: Path
) -> None:
    conf = write("run", SLOW)
    job = SlurmJob.submit(cluster, tmp_path, "slurm.sbatch", conf, "run.time_limit=0", DPGEN_MAX_FRUITLESS="2")
    assert job.wait() == "FAILED"
    assert job.describe()["ExitCode"] == "75:0"
    assert job.num_restarts == 1
    assert "2 attempts in a row ended without a new row" in job.output
