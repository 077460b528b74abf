"""Measure what a rank's own process costs while its engines generate 75,000 tokens/s: text, journal, and all the rest.

    python benchmarks/rank_core.py [--engines 3] [--tokens-per-s 75000] [--rows 12000] [--hold-ms 0,20,100]

Processes that make random tokens at that rate stand for the engines; everything on the rank's side is the real one:
the pool, the loop, claims, rendering, decoding and the journal. The rank keeps up while its main thread needs less than
one core. Lengths are chat-like.

With --hold-ms engines keep finished rows for so long, and send them together. `send_us_per_row` is what a row takes an
engine to pickle and send, of its thread that steps.
"""

from __future__ import annotations

import heapq
import json
import multiprocessing
import random
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

from engine import list_settings
from loaded_engines import time_rank
from measure import make_parser, make_rows, run_benchmark, write_rows
from random_model import save_random_model

NUM_SEQS = 256


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--tokens-per-s", type=int, default=75_000)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--hold-ms", default="0", help="comma-separated; for how long engines keep finished rows")
    options = parser.parse_args()
    settings = {"engines": options.engines, "tokens_per_s": options.tokens_per_s, "rows": options.rows}

    def measure_all(work_dir: Path) -> dict[str, Any]:
        found = {}
        for hold_ms in map(float, options.hold_ms.split(",")):
            found[f"{hold_ms:g} ms"] = measure(work_dir / f"{hold_ms:g}", hold_s=hold_ms / 1e3, **settings)
            print(f"kept for {hold_ms:g} ms: {found[f'{hold_ms:g} ms']}", flush=True)
        return found

    run_benchmark("rank_core", options.dir, measure_all, **settings)


def measure(work_dir: Path, engines: int, tokens_per_s: int, rows: int, hold_s: float) -> dict[str, Any]:
    """Generate the rows, and return the rate that was reached and the processor time that it took."""
    import datasets

    from dpgen.config.loader import load
    from dpgen.data.input_rows import InputRows
    from dpgen.engine.messages import EngineSpec
    from dpgen.engine.pool.engine_count import EngineCount
    from dpgen.engine.pool.engine_pool import EnginePool
    from dpgen.engine.starting.launch import load_text_steps
    from dpgen.engine.starting.limits import EngineLimits
    from dpgen.journal.run_dir import RunDir

    model, path = save_random_model(work_dir / "model", "1b"), work_dir / "rows.jsonl"
    write_rows(path, make_rows("chat", rows, 2048))
    num_tokens = sum(json.loads(line)["budget"] for line in path.read_text().splitlines())
    config = load([], list_settings(str(work_dir), str(model), {}, "dpgen-seeded", str(path)))
    texts = load_text_steps(config, InputRows(datasets.Dataset.from_dict({})))
    step_s = NUM_SEQS * engines / tokens_per_s
    count = EngineCount(engines, "the benchmark's")
    start = partial(PacedEngine, step_s, hold_s)
    pool = EnginePool(start, EngineSpec("fake", "m", num_engines=engines), EngineLimits(600, 600, 1), count)
    pool.load_model(lambda measured: measured, lambda: None)
    while pool.num_ready < engines:
        pool.poll(0.1)
    run_dir = RunDir(str(work_dir / "run"))
    run_dir.create()
    main_s = time.thread_time()
    seconds, processor_s = time_rank(config, run_dir.journal, 1, pool, texts)
    main_s = time.thread_time() - main_s
    pool.kill()
    return {
        "tokens_per_s": round(num_tokens / seconds),
        "main_thread_us_per_token": round(1e6 * main_s / num_tokens, 2),
        "process_us_per_token": round(1e6 * processor_s / num_tokens, 2),
        "cores_of_main_thread": round(main_s / num_tokens * tokens_per_s, 3),
        "cores_of_process": round(processor_s / num_tokens * tokens_per_s, 3),
        "send_us_per_row": round(1e6 * sum(engine.send_s for engine in PacedEngine.started) / rows, 1),
        "rows_per_message": round(rows / sum(engine.num_messages for engine in PacedEngine.started), 2),
    }


class PacedEngine:
    """Stand for an engine's process, as its supervisor uses it; see `EngineHandle`.

    Attributes:
        started: those of the last pool.
        send_s: processor seconds that sending rows took; num_messages: in which they came.
    """

    log_path = None
    started: ClassVar[list[PacedEngine]] = []

    def __init__(self, step_s: float, hold_s: float, spec: Any, index: int = 0) -> None:
        from dpgen.engine.messages import OptionsChecked

        if index == 0:
            self.started.clear()
        self.started.append(self)
        self.send_s, self.num_messages = 0.0, 0
        self.pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=generate, args=(theirs, step_s, hold_s, index), daemon=True)
        self._process.start()
        self._events: list[Any] = [OptionsChecked(num_engines=spec.num_engines)]

    def load_model(self, kv_bytes: int | None = None) -> None:
        from dpgen.engine.messages import KvBytesMeasured

        if kv_bytes is None:
            self._events.append(KvBytesMeasured(1 << 30))
        else:
            self.set_kv_bytes(kv_bytes)

    def set_kv_bytes(self, num_bytes: int) -> None:
        from dpgen.engine.messages import EngineInfo, EngineReady

        self._events.append(EngineReady(EngineInfo(NUM_SEQS, 4096, num_bytes, 16)))

    def set_text_config(self, text_config: Any) -> None: ...

    def submit(self, requests: list[Any]) -> None:
        self.pipe.send(requests)

    def poll(self, timeout_s: float) -> list[Any]:
        from dpgen.engine.messages import EngineStats

        events, self._events = self._events, []
        while self.pipe.poll(0 if events else timeout_s):
            events.append(self.pipe.recv())
            if isinstance(events[-1], EngineStats):
                self.send_s = events[-1].processor_s
            else:
                self.num_messages += 1
        return events

    def show_errors(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def generate(pipe: Connection, step_s: float, hold_s: float, seed: int) -> None:
    """Finish the requests that come, each after as many steps as it has tokens, at most NUM_SEQS at a time."""
    from dpgen.engine.messages import EngineStats, RowsFinished
    from dpgen.records import Completion, RowResult, UndecodedRow

    rng = random.Random(seed)
    waiting: list[Any] = []
    running: list[tuple[int, int, Any]] = []  # (step in which it ends, number, request)
    step = number = num_tokens = 0
    finished: list[UndecodedRow] = []
    send_s, next_s = 0.0, time.monotonic()
    next_stats_s = next_send_s = next_s
    while True:
        while pipe.poll(0 if running else None):
            waiting += pipe.recv()
            if len(running) < NUM_SEQS and waiting:
                break
        while waiting and len(running) < NUM_SEQS:
            request, number = waiting.pop(0), number + 1
            heapq.heappush(running, (step + request.sampling["max_tokens"], number, request))
        next_s = max(next_s + step_s, time.monotonic() - 0.1)
        time.sleep(max(0.0, next_s - time.monotonic()))
        step, num_tokens = step + 1, num_tokens + len(running)
        while running and running[0][0] <= step:
            request = heapq.heappop(running)[2]
            count = request.sampling["max_tokens"]
            result = RowResult(request.row, len(request.prompt_token_ids), (Completion("", "length", count),))
            tokens = [rng.randrange(300, 18_000) for _ in range(count)]
            finished.append(UndecodedRow(result.with_id(request.id), (tokens,), True))
        if time.monotonic() >= next_stats_s:
            next_stats_s = time.monotonic() + 1
            pipe.send(EngineStats(num_tokens, len(running), len(waiting), processor_s=send_s))
        if finished and (time.monotonic() >= next_send_s or not running):
            began_s, next_send_s = time.thread_time(), time.monotonic() + hold_s
            pipe.send(RowsFinished([], finished))
            send_s += time.thread_time() - began_s
            finished = []


if __name__ == "__main__":
    main()
