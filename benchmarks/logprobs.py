"""Measure what keeping log-probabilities costs: processor time from a request to the journal, with and without it.

    python benchmarks/logprobs.py [--rows 400] [--rounds 7] [--k 20]

One process, on one core: vLLM, and what the rank does with its results (the pipe's pickling, decoding the text, the
journal, synced). Processor time, so that other work on the machine counts little. Ways, in turn in every round:
- kept: the result holds the log-probabilities
- dropped: vLLM computes them as it does by default, an object for each; they are dropped, as in older versions
- flat-dropped: vLLM computes them in its flat form; they are dropped
- none: vLLM computes none

The tests' tiny model makes a token in a tenth of a millisecond, so every other cost shows.
Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import os
import pickle
import time
from functools import partial
from pathlib import Path
from typing import Any

from measure import (
    TINY_ENGINE,
    compute_ratio,
    make_parser,
    make_rows,
    make_tiny_model,
    measure_in_turn,
    run_benchmark,
)

WAYS = ("kept", "dropped", "flat-dropped", "none")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    os.sched_setaffinity(0, [options.core])  # before torch counts the cores
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    run_benchmark("logprobs", options.dir, lambda work_dir: Bench(options, work_dir).measure(), k=options.k)


class Bench:
    """Take the same rows through one engine and into a journal, in each of the ways."""

    def __init__(self, options: argparse.Namespace, work_dir: Path) -> None:
        from transformers import AutoTokenizer

        from dpgen.data.detokenize import Detokenizer, fast_tokenizer
        from dpgen.engine.messages import EngineSpec, EngineTextConfig
        from dpgen.engine.vllm.vllm_backend import VllmBackend

        model = make_tiny_model(work_dir)
        sampling = {"temperature": 1.0, "ignore_eos": True}
        self.backend = VllmBackend(
            EngineSpec("vllm", str(model), dict(TINY_ENGINE), sampling, ("max_tokens", "logprobs"), token_ids=True)
        )
        self.backend.check_options()
        self.backend.load(lambda measured: measured)
        self.backend.prepare_job(EngineTextConfig(skip_detokenize=True))
        self.read_result = self.backend._to_result
        self.rows = make_rows(options.workload, options.rows, options.longest)
        tokenizer = AutoTokenizer.from_pretrained(model)
        fast = fast_tokenizer(tokenizer)
        assert fast is not None
        self.detokenizer = Detokenizer(fast)
        self.prompts = [tokenizer(row["prompt"])["input_ids"] for row in self.rows]
        self.k, self.num_rounds, self.work_dir, self.num_runs = options.k, options.rounds, work_dir, 0

    def measure(self) -> dict[str, Any]:
        self.time(WAYS[0])  # a warm-up: fills caches
        seconds = measure_in_turn({way: partial(self.time, way) for way in WAYS}, self.num_rounds)
        num_tokens = sum(row["budget"] for row in self.rows)
        record: dict[str, Any] = {"tokens": num_tokens}
        print(f"{'way':<14} {'processor seconds':>18} {'us a token':>12} {'kept over it':>26}")
        for way, times_s in seconds.items():
            median_s = sorted(times_s)[len(times_s) // 2]
            record[way] = [round(time_s, 3) for time_s in times_s]
            ratio = record[f"kept_over_{way}"] = compute_ratio(seconds["kept"], times_s)
            shown = f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
            print(f"{way:<14} {median_s:>18.2f} {median_s / num_tokens * 1e6:>12.1f} {shown:>26}", flush=True)
        return record

    def time(self, way: str) -> float:
        """Return the processor seconds of all rows."""
        from dpgen.engine.messages import RowsFinished
        from dpgen.journal.writer import JournalWriter
        from dpgen.records import Request, RequestId, RowResult
        from dpgen.scheduling.result_recorder import ResultRecorder

        self.num_runs += 1
        backend, drops = self.backend, way.endswith("dropped")
        backend._to_result = self.drop if drops else self.read_result  # type: ignore[method-assign]
        journal_dir = self.work_dir / f"journal-{self.num_runs}"
        journal_dir.mkdir()
        logprobs = {} if way == "none" else {"logprobs": self.k}
        started_s = time.process_time()
        journal = JournalWriter(journal_dir, 1, 0)
        results = ResultRecorder(journal, self.detokenizer)
        for row, (prompt, fields) in enumerate(zip(self.prompts, self.rows, strict=True)):
            backend.add_request(Request(RequestId(row), prompt, None, {"max_tokens": fields["budget"], **logprobs}))
            if way == "dropped":
                assert backend._engine is not None
                state = next(reversed(backend._engine.output_processor.request_states.values()))
                assert state.logprobs_processor is not None
                state.logprobs_processor.logprobs = []
        num_results = 0
        while backend.has_unfinished_requests():
            finished = backend.step()
            decoded = [row for row in finished if isinstance(row, RowResult)]
            message = RowsFinished(decoded, [row for row in finished if not isinstance(row, RowResult)])
            message = pickle.loads(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
            for result in (*message.results, *message.undecoded):
                results.add(result)
            for added in results.take_recorded():
                assert added.error is None and (added.completions[0].logprobs is None) is (way != "kept")
                num_results += 1
        journal.close()
        assert num_results == len(self.rows)
        return time.process_time() - started_s

    def drop(self, output: Any) -> Any:
        for sample in output.outputs:
            sample.logprobs = None
        return self.read_result(output)


if __name__ == "__main__":
    main()
