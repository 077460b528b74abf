"""Kill runs of a program at random, at changing world sizes, and count what is repeated.

    python tests/helpers/program_kills.py --kills 200             # on the fake engine
    python tests/helpers/program_kills.py --kills 10 --model DIR  # on real vLLM, with a model in a folder

On real vLLM log-probabilities may differ in their last digits, since rows run in other batches after each start.
Prints one JSON line. The exit status is 1 if a call is repeated, or the dataset differs from an undisturbed run's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
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


def is_near(one: Any, other: Any) -> bool:
    """Return True if two values are the same, but for the last digits of numbers, also in JSON text."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_near(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_near, one, other))
    if isinstance(one, str) and isinstance(other, str) and one != other:
        with contextlib.suppress(ValueError):
            return is_near(json.loads(one), json.loads(other))
    return bool(one == other)


def kill_at_random(
    arguments: list[str],
    run_dir: Path,
    num_kills: int,
    draw: random.Random,
    *,
    max_ranks: int = 3,
    until_s: float = math.inf,
) -> int:
    """Run until complete, with up to `num_kills` kills of all processes; return how many there were.

    Args:
        arguments: of `dpgen run`.
        max_ranks: of each start.
        until_s: time of the clock `time.monotonic` from which on none follows.
    """
    log, killed = run_dir.with_suffix(".log"), 0
    while True:
        process = start(arguments, draw.randint(1, max_ranks), log)
        before, wanted = count_bytes(run_dir), draw.randint(200, 6000)
        deadline_s = time.monotonic() + _TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline_s:
            may_kill = killed < num_kills and time.monotonic() < until_s
            if may_kill and count_bytes(run_dir) - before > wanted:
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
    parser.add_argument("--max-ranks", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no kills after these; the last run completes")
    parser.add_argument("--model", help="a model's folder, for real vLLM")
    options = parser.parse_args()
    draw, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="dpgen-programs-"))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{row}"}) + "\n" for row in range(options.rows)))
    engine = ["run.engine=fake", "model=none", "engine.step_s=0.01", "engine.max_num_seqs=8"]
    if options.model:
        engine = [f"model={options.model}", "engine.max_model_len=256", "engine.enforce_eager=true"]
        engine += ["engine.dtype=float32", "engine.max_num_seqs=8", "engine.kv_cache_memory_bytes=67108864"]
    common = [f"data.path={data}", *engine, "program.function=helpers.programs:branch", "run.report=false"]
    assert start([*common, f"run.dir={folder / 'undisturbed'}"], 1, folder / "undisturbed.log").wait() == 0
    expected = read_rows(folder / "undisturbed")
    num_kills = num_runs = num_calls = num_repeated = 0
    started_s = time.monotonic()
    until_s = started_s + 60 * options.minutes
    while num_kills < options.kills and time.monotonic() < until_s:
        run_dir = folder / f"run-{num_runs}"
        num_left = options.kills - num_kills
        arguments = [*common, f"run.dir={run_dir}"]
        num_kills += kill_at_random(arguments, run_dir, num_left, draw, max_ranks=options.max_ranks, until_s=until_s)
        num_repeated += count_repeated_calls(run_dir)
        num_runs += 1
        num_calls += len(list_calls(run_dir))
        if not is_near(read_rows(run_dir), expected) or (not options.model and read_rows(run_dir) != expected):
            print(f"{run_dir} differs from {folder / 'undisturbed'}")
            return 1
    facts = {"kills": num_kills, "runs": num_runs, "calls": num_calls, "repeated": num_repeated, "rows": options.rows}
    print(json.dumps({**facts, "seed": options.seed, "seconds": round(time.monotonic() - started_s)}))
    return int(num_repeated > 0)


if __name__ == "__main__":
    sys.exit(main())
