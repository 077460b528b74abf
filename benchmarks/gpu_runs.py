"""Run single rows of gpu.py's table, each as processes of its own, and read what they measured."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_rows import BenchmarkRow
from measure import (
    REPO,
    build_job_settings,
    build_torchrun_command,
    find_engine,
    make_rows,
    read_run,
    time_command,
    write_rows,
)
from random_model import save_random_model

ENGINE = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 256, "load_format": "dummy"}
_JOURNAL_BYTES_PER_TOKEN = 1.0  # once this much is written, a third to half of a run is done
_POLL_S = 0.1
_LEASE_S = "24"  # of ranks, where one is killed


class RowRunner:
    """Run rows on given GPUs.

    Args:
        model: a directory in place of the random models; None for those.
        engine: options in place of `ENGINE`; None for that.
    """

    def __init__(self, work_dir: Path, model: str | None, engine: dict[str, Any] | None) -> None:
        self._work_dir, self._model, self._engine = work_dir, model, ENGINE if engine is None else engine
        self._lock = threading.Lock()  # several rows may need the same files

    def build_command(self, row: BenchmarkRow) -> list[str]:
        """Return the command of a row, and write the files that it reads."""
        engine = {**self._engine, **row.engine}
        model = self._write_model(row.size)
        if row.way == "profile":
            flags = ["--sequences", str(engine["max_num_seqs"]), *(["--seeds"] if row.has_seeds else [])]
            program = ["benchmarks/step_profile.py", str(model), "--engine", json.dumps(engine), *flags]
            return [sys.executable, *program]
        data = self._write_data(row)
        if row.way == "generate":
            return [sys.executable, "benchmarks/llm_generate.py", str(data), str(model), json.dumps(engine)]
        settings = [*build_job_settings(self._work_dir / row.name / "run", model, data, engine), *row.settings]
        launcher = [sys.executable] if row.death == "rank" else build_torchrun_command(row.ranks)
        return [*launcher, "-m", "dpgen", "run", *settings]

    def show_command(self, row: BenchmarkRow) -> str:
        """Return the row's command as one would type it."""
        text = shlex.join(self.build_command(row)).replace(str(self._work_dir), "DIR")
        text = text.replace(sys.executable + " -m torch.distributed.run", "torchrun").replace(sys.executable, "python")
        return f"srun -n {row.ranks} {text}" if row.death == "rank" else text

    def run(self, row: BenchmarkRow, gpus: Sequence[str], timeout_s: float) -> dict[str, Any]:
        """Return what a row measures.

        Raises:
            SystemExit: the row fails, or takes too long; with its output.
        """
        command, folder = self.build_command(row), self._work_dir / row.name
        environment: dict[str, Any] = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "OMP_NUM_THREADS": "4"}
        environment["HF_HOME"] = str(self._work_dir / "hf")
        if row.has_cold_caches:
            environment["VLLM_CACHE_ROOT"] = str(folder / "vllm-cache")
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor-cache")
            environment["TRITON_CACHE_DIR"] = str(folder / "triton-cache")
        with contextlib.ExitStack() as stack:
            if row.has_mps:
                environment |= stack.enter_context(run_mps(folder))
            if row.death == "rank":
                wall_s = self._run_like_srun(row, command, environment, timeout_s)
            else:
                if row.death == "engine":
                    stack.enter_context(self._kill_in_the_middle(row))
                wall_s = time_command(command, folder / "log", timeout_s=timeout_s, **environment)
        return {"wall_s": round(wall_s, 1), **self._read(row)}

    def _read(self, row: BenchmarkRow) -> dict[str, Any]:
        """Return what a finished row wrote."""
        log = (self._work_dir / row.name / "log").read_text(errors="replace")
        if row.way == "profile":
            profile: dict[str, Any] = json.loads(_find_line(log, "PROFILE"))
            return profile
        budgets = [json.loads(line)["budget"] for line in self._write_data(row).read_text().splitlines()]
        if row.way == "generate":
            seconds = float(_find_line(log, "SECONDS"))
            return {"tokens": sum(budgets), "seconds": round(seconds, 2), "tokens_per_s": sum(budgets) / seconds}
        run_dir = self._work_dir / row.name / "run"
        run, result = read_run(run_dir), json.loads((run_dir / "_SUCCESS").read_text())
        num_tokens = result["num_generated_tokens"]  # those of a rank that was killed, too
        measured: dict[str, Any] = {
            "tokens": num_tokens,
            "seconds": round(run["longest_s"], 2),
            "tokens_per_s": num_tokens / run["longest_s"],
            "balance": round(run["balance"], 3),
            "is_complete": num_tokens == sum(budgets) and not result["num_errors"],
        }
        for key, pattern in _LOG_FACTS.items():
            if found := re.findall(pattern, log):
                measured[key] = found[-1]
        return measured

    def _write_model(self, size: str) -> Path:
        if self._model is not None:
            return Path(self._model)
        with self._lock:
            folder = self._work_dir / size
            return folder if folder.exists() else save_random_model(folder, size)

    def _write_data(self, row: BenchmarkRow) -> Path:
        sort = "sorted" if row.is_sorted else "shuffled"
        path = self._work_dir / f"{row.workload}-{row.num_rows}-{sort}.jsonl"
        with self._lock:
            if path.exists():
                return path
            return write_rows(path, make_rows(row.workload, row.num_rows, row.longest, is_sorted=row.is_sorted))

    @contextlib.contextmanager
    def _kill_in_the_middle(self, row: BenchmarkRow) -> Iterator[None]:
        """Kill the engine of rank 0 once the run is in its middle."""
        is_done = threading.Event()

        def watch() -> None:
            if self._wait_for_the_middle(row, is_done):
                engine = find_engine(str(self._work_dir / row.name / "run"), 0)
                assert engine is not None
                os.kill(engine, signal.SIGKILL)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()

    def _wait_for_the_middle(self, row: BenchmarkRow, is_done: threading.Event) -> bool:
        """Return True once a good part of the results is on the disk, False if the run ends before."""
        journal = self._work_dir / row.name / "run" / "journal"
        tokens = sum(json.loads(line)["budget"] for line in self._write_data(row).read_text().splitlines())
        while not is_done.wait(_POLL_S):
            if sum(path.stat().st_size for path in journal.glob("*.journal")) > _JOURNAL_BYTES_PER_TOKEN * tokens:
                return True
        return False

    def _run_like_srun(
        self, row: BenchmarkRow, command: Sequence[str], environment: dict[str, str], timeout_s: float
    ) -> float:
        """Start a process for each rank as srun does, kill the last one in the middle, and return the seconds."""
        sys.path.insert(0, str(REPO / "tests"))
        from helpers.jobs import Launcher

        folder, started_s = self._work_dir / row.name, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        launcher = Launcher(folder)
        environment = {**environment, "DPGEN_LEASE_S": _LEASE_S}
        jobs = launcher.start_like_srun(*command[3:], rank_arguments=[[]] * row.ranks, **environment)
        is_done, deadline_s = threading.Event(), started_s + timeout_s
        timer = threading.Timer(timeout_s, is_done.set)
        timer.start()
        try:
            if self._wait_for_the_middle(row, is_done):
                jobs[-1].end()
            statuses = [job.process.wait(max(1.0, deadline_s - time.monotonic())) for job in jobs[:-1]]
        except subprocess.TimeoutExpired:
            statuses = [1]
        finally:
            timer.cancel()
            for job in jobs:
                job.end()
        (folder / "log").write_text("".join(job.output for job in jobs))
        if any(statuses):
            sys.exit((folder / "log").read_text())
        return time.monotonic() - started_s


@contextlib.contextmanager
def run_mps(folder: Path) -> Iterator[dict[str, str]]:
    """Run NVIDIA's MPS daemon, and yield the variables of its clients."""
    variables = {}
    for name in ("pipe", "log"):
        directory = folder / f"mps-{name}"
        directory.mkdir(parents=True, exist_ok=True)
        variables[f"CUDA_MPS_{name.upper()}_DIRECTORY"] = str(directory)
    environment = {**os.environ, **variables}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(["nvidia-cuda-mps-control", "-f"], env=environment, **quiet) as daemon:  # type: ignore[call-overload]
        time.sleep(2)  # it reports nothing when it is ready
        try:
            yield variables
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["nvidia-cuda-mps-control"], input="quit\n", text=True, env=environment, timeout=10, **quiet
                )  # type: ignore[call-overload]
            daemon.terminate()


# What a row's log tells, by the key in the record.
_LOG_FACTS = {
    "ready": r"ready (after .*)",
    "engines": r"(\d+ engines? (?:a rank|on a GPU)\b.*)",
    "of_the_bound": r"efficiency ([\d.]+) of the bound",
}


def _find_line(log: str, word: str) -> str:
    lines = [line.removeprefix(word) for line in log.splitlines() if line.startswith(f"{word} ")]
    if not lines:
        sys.exit(log)
    return lines[-1]
