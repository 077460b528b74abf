"""Kill runs of a program at random, at changing world sizes, and count what is repeated.

    python tests/helpers/program_kills.py --kills 200             # on the fake engine
    python tests/helpers/program_kills.py --kills 10 --model DIR  # on real vLLM, with a model in a folder

Prints one JSON line. The exit status is 1 if a call is repeated, or the dataset differs from an undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
for folder in (REPO, REPO / "tests"):
    sys.path.insert(0, str(folder))

from dpgen.journal.calls import FinishedCall, decode_call  # noqa: E402 - after the path
from dpgen.journal.reader import JournalReader, index_attempts  # noqa: E402 - as above

_TIMEOUT_S = 600


def list_calls(run_dir: Path) -> list[FinishedCall]:
    """Return the finished calls in a journal."""
    index, _ = index_attempts(run_dir / "journal", lambda rows: np.ones(len(rows), dtype=bool))
    with JournalReader(index) as reader:
        calls = [decode_call(reader.payload(position)) for position in range(len(index))]
    return [call for call in calls if call is not None]


def count_repeated_calls(run_dir: Path) -> int:
    """Return how many calls a journal holds more than once."""
    return sum(count - 1 for count in Counter(call.id for call in list_calls(run_dir)).values())


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a finished run."""
    import pyarrow.parquet as pq

    files = sorted((run_dir / "dataset").glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def start(arguments: list[str], ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a run of some ranks, with its output in a file."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        command = [sys.executable, *launcher, "-m", "dpgen", "run", *arguments]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def count_bytes(run_dir: Path) -> int:
    """Return the bytes in a run's journals."""
    num_bytes = 0
    for path in (run_dir / "journal").glob("*.journal"):
        with contextlib.suppress(FileNotFoundError):  # one without rows is removed
            num_bytes += path.stat().st_size
    return num_bytes


def kill_at_random(arguments: list[str], run_dir: Path, num_kills: int, draw: random.Random) -> int:
    """Run until complete, with up to `num_kills` kills of all processes; return how many there were.

    Args:
        arguments: of `dpgen run`.
    """
    log, killed = run_dir.with_suffix(".log"), 0
    while True:
        process = start(arguments, draw.randint(1, 3), log)
        before, wanted = count_bytes(run_dir), draw.randint(200, 6000)
        deadline_s = time.monotonic() + _TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline_s:
            if killed < num_kills and count_bytes(run_dir) - before > wanted:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.005)
        status = process.wait(10)
        if status == 0:
            return killed
        if status not in (-signal.SIGKILL, 75):
            raise RuntimeError(f"a start ended with status {status}:\n{log.read_text()[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a model's folder, for real vLLM")
    options = parser.parse_args()
    draw, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="dpgen-programs-"))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{row}"}) + "\n" for row in range(options.rows)))
    engine = ["run.engine=fake", "model=none", "engine.step_s=0.01", "engine.max_num_seqs=8"]
    if options.model:
        engine = [f"model={options.model}", "engine.max_model_len=256", "engine.enforce_eager=true"]
    common = [f"data.path={data}", *engine, "program.function=helpers.programs:branch", "run.report=false"]
    assert start([*common, f"run.dir={folder / 'undisturbed'}"], 1, folder / "undisturbed.log").wait() == 0
    expected, num_kills, num_runs, num_repeated = read_rows(folder / "undisturbed"), 0, 0, 0
    started_s = time.monotonic()
    while num_kills < options.kills:
        run_dir = folder / f"run-{num_runs}"
        num_kills += kill_at_random([*common, f"run.dir={run_dir}"], run_dir, options.kills - num_kills, draw)
        num_repeated += count_repeated_calls(run_dir)
        num_runs += 1
        if read_rows(run_dir) != expected:
            print(f"{run_dir} differs from {folder / 'undisturbed'}")
            return 1
    facts = {"kills": num_kills, "runs": num_runs, "repeated": num_repeated, "rows": options.rows}
    print(json.dumps({**facts, "seed": options.seed, "seconds": round(time.monotonic() - started_s)}))
    return int(num_repeated > 0)


if __name__ == "__main__":
    sys.exit(main())
