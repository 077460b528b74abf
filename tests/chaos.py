"""Kill processes of a run at random until the run is complete, and compare its result with an undisturbed run.

    python tests/chaos.py --kills 1000                 # on the fake engine
    python tests/chaos.py --kills 30 --engine vllm     # on real vLLM, with the demo's model

Engines, ranks and launchers receive SIGKILL at random times, including start-up and the final write. Each resume has
a random world size. If a run completes before all kills are spent, the next run starts in a new directory. The output
ends with a table and one JSON line. The exit status is 1, and the directory is kept, if any row was lost, duplicated,
out of order, or different.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from helpers.jobs import Job, Launcher, descendants, load_result

_WAIT_S = {"fake": 4.0, "vllm": 20.0}  # the longest time from a start or a kill to the next kill


class Chaos:
    """Run one series of kills.

    Args:
        folder: receives all files.
        engine: "fake" or "vllm".
        seed: of all random choices, though not of the machine's timing.
    """

    def __init__(self, folder: Path, engine: str, num_rows: int, seed: int) -> None:
        self.folder, self.engine = folder, engine
        self.random = random.Random(seed)
        self.launcher = Launcher(folder)
        self.kills: Counter[str] = Counter()
        self.num_attempts = self.num_runs = 0
        self.conf = self._write_config(num_rows)
        self.expected = self._run_undisturbed()

    def _write_config(self, num_rows: int) -> str:
        data = self.folder / "rows.jsonl"
        questions = [f"What is {self.random.randrange(1000)} + {self.random.randrange(1000)}?" for _ in range(num_rows)]
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
        conf: dict[str, Any] = {
            "run": {"dir": "set by --dir", "engine": self.engine, "log_level": "error"},
            "model": "conf/demo/model",
            "data": {"path": str(data), "prompt_column": "prompt"},
            "sampling": {"temperature": 0.8},
        }
        if self.engine == "fake":
            conf["engine"] = {"step_s": 0.01, "max_num_seqs": 8}
        else:
            conf["data"]["as_chat"] = True
            conf["engine"] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True}
            conf["engine"]["kv_cache_memory_bytes"] = 32 << 20
            conf["sampling"] = {"temperature": 0.8, "top_k": 0, "max_tokens": 80, "ignore_eos": True}
        path = self.folder / "conf.yaml"
        path.write_text(yaml.safe_dump(conf))
        return str(path)

    def _run_undisturbed(self) -> list[dict[str, Any]]:
        run_dir = self.folder / "undisturbed" / "run"
        job = self.launcher.dpgen("run", self.conf, f"run.dir={run_dir}", *self._fast())
        assert job.wait() == 0, job.output
        job.end()
        return load_result(run_dir)

    def _fast(self) -> list[str]:
        return ["engine.step_s=0"] if self.engine == "fake" else []

    def run(self, num_kills: int) -> None:
        """Kill `num_kills` times, over as many runs as needed, and check each run's result."""
        while sum(self.kills.values()) < num_kills:
            self.num_runs += 1
            run_dir = self.folder / f"chaos-{self.num_runs}" / "run"
            while not (run_dir / "_SUCCESS").exists():
                self._run_attempt(run_dir, num_kills)
            self._check(run_dir)
            shutil.rmtree(run_dir.parent)
            print(f"run {self.num_runs} is sound after {sum(self.kills.values())} kills", file=sys.stderr, flush=True)

    def _run_attempt(self, run_dir: Path, num_kills: int) -> None:
        """Start the run on a random number of ranks and kill until it ends, complete or killed."""
        self.num_attempts += 1
        ranks = self.random.choice([1, 2, 2, 3] if self.engine == "fake" else [1, 2])
        job = self.launcher.dpgen("run", self.conf, f"run.dir={run_dir}", ranks=ranks)
        try:
            while sum(self.kills.values()) < num_kills:
                if self._has_ended_within(job, self.random.uniform(0, _WAIT_S[self.engine])):
                    return
                if self._kill_one(job) != "engine":
                    return
            job.wait(600)
        finally:
            job.end()
            job.log.unlink()

    def _has_ended_within(self, job: Job, wait_s: float) -> bool:
        deadline_s = time.monotonic() + wait_s
        while time.monotonic() < deadline_s:
            status = job.process.poll()
            if status is not None:
                if status not in (0, 75):
                    print(f"a run ended by itself with status {status}:\n{job.output}", file=sys.stderr)
                return True
            time.sleep(0.02)
        return False

    def _kill_one(self, job: Job) -> str:
        kind = self.random.choice(["engine"] * 4 + ["rank", "launcher"])
        victims = [job.process.pid]
        if kind == "engine":
            victims = descendants(job.process.pid, b"dpgen.engine.server")
        elif kind == "rank":
            victims = descendants(job.process.pid, b"dpgen\0run") or victims
        if victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(victims), signal.SIGKILL)
                self.kills[kind] += 1
        return kind

    def _check(self, run_dir: Path) -> None:
        rows = load_result(run_dir)
        ids = [row["row_id"] for row in rows]
        assert ids == list(range(len(self.expected))), f"rows lost, duplicated or out of order in {run_dir}"
        failed = [row for row in rows if row["error"]]
        assert not failed, f"rows with an error in {run_dir}: {failed[:3]}"
        assert rows == self.expected, f"results differ from the undisturbed run in {run_dir}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--engine", choices=["fake", "vllm"], default="fake")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dpgen-chaos-"))
    started_s = time.monotonic()
    chaos = Chaos(folder, options.engine, options.rows, options.seed)
    try:
        chaos.run(options.kills)
    except AssertionError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        for job in chaos.launcher.jobs:
            job.end()
    shutil.rmtree(folder)
    facts = {
        "engine": options.engine,
        "kills": dict(chaos.kills),
        "num_kills": sum(chaos.kills.values()),
        "num_runs": chaos.num_runs,
        "num_attempts": chaos.num_attempts,
        "rows_per_run": options.rows,
        "seconds": round(time.monotonic() - started_s),
    }
    for name, value in facts.items():
        print(f"{name:>14}  {value}")
    print("no row lost, duplicated, out of order, or different")
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
