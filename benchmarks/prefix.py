"""Measure what `work.order=prefix` gains: few long documents, many questions about each, in random order.

    python benchmarks/prefix.py [--documents 64] [--questions 24] [--rounds 5]

Whole runs of one rank on one core, bound by prefill: two tokens are generated per prompt of some hundred tokens. The KV
cache holds a part of the documents. Runs alternate between `work.order=prefix` and `dataset`. Compared are the seconds
from the first row to the last, and the fraction of prompt tokens from vLLM's prefix cache. The ideal is every token of
a document except in its first row, in whole blocks.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

from measure import (
    TINY_ENGINE,
    WORDS,
    compute_ratio,
    make_parser,
    make_tiny_model,
    measure_in_turn,
    run_benchmark,
    time_command,
    write_rows,
)

_DOCUMENT_WORDS = 320
_BLOCK_TOKENS = 32  # the smallest block that attention on the CPU takes


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    run_benchmark("prefix", options.dir, lambda work_dir: measure(options, work_dir))


def measure(options: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    model = make_tiny_model(work_dir)
    documents, rows = make_questions(options.documents, options.questions)
    data = write_rows(work_dir / "rows.jsonl", rows)
    ideal = compute_ideal_fraction(model, rows, documents)
    fractions: dict[str, list[float]] = {"prefix": [], "dataset": []}

    def run(order: str) -> float:
        run_dir = work_dir / f"{order}-{len(fractions[order])}"
        busy_s, cached_fraction = run_once(run_dir, model, data, order)
        fractions[order].append(cached_fraction)
        return busy_s

    seconds = measure_in_turn({order: partial(run, order) for order in fractions}, options.rounds)
    ratio = compute_ratio(seconds["dataset"], seconds["prefix"])
    print(f"{'order':<10} {'seconds':>9} {'from the cache':>15} {'of the ideal':>13}")
    for order, times_s in seconds.items():
        fraction = sorted(fractions[order])[len(fractions[order]) // 2]
        print(f"{order:<10} {sorted(times_s)[len(times_s) // 2]:>9.2f} {fraction:>15.3f} {fraction / ideal:>13.3f}")
    print(f"dataset takes {ratio['median']:.2f} times as long ({ratio['min']:.2f} to {ratio['max']:.2f})")
    return {"seconds": seconds, "dataset_over_prefix": ratio, "shares": fractions, "ideal_share": round(ideal, 4)}


def make_questions(num_documents: int, num_questions: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Return documents, and shuffled rows with questions about them."""
    choose = random.Random(0)
    documents = [" ".join(choose.choices(WORDS, k=_DOCUMENT_WORDS)) for _ in range(num_documents)]
    rows = [
        {"prompt": f"{text} question {number} {' '.join(choose.choices(WORDS, k=5))}", "document": document}
        for document, text in enumerate(documents)
        for number in range(num_questions)
    ]
    choose.shuffle(rows)
    return documents, rows


def run_once(run_dir: Path, model: Path, data: Path, order: str) -> tuple[float, float]:
    """Run all rows on one core; return the rank's busy seconds and the fraction of cached prompt tokens."""
    # The KV cache has room for about ten documents, beside the running rows.
    engine = {**TINY_ENGINE, "max_num_seqs": 16, "kv_cache_memory_bytes": 20 << 20, "block_size": _BLOCK_TOKENS}
    config = [f"run.dir={run_dir}", f"model={model}", f"data.path={data}", "data.prompt_column=prompt"]
    config += ["sampling.ignore_eos=true", "sampling.max_tokens=2", f"work.order={order}"]
    command = ["taskset", "-c", "0", sys.executable, "-m", "dpgen", "run", *config, f"engine={json.dumps(engine)}"]
    time_command(command, run_dir.with_suffix(".log"), HF_HOME=str(run_dir.parent / "hf"))
    [rank] = json.loads((run_dir / "run.json").read_text())["manifests"]
    return float(rank["busy_s"]), rank["num_cached_tokens"] / rank["num_prompt_tokens"]


def compute_ideal_fraction(model: Path, rows: list[dict[str, Any]], documents: list[str]) -> float:
    """Return the fraction of prompt tokens in blocks that a document fills, without each document's first row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    block_tokens = [len(tokenizer(text)["input_ids"]) // _BLOCK_TOKENS * _BLOCK_TOKENS for text in documents]
    total = sum(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
    return float(sum(block_tokens[row["document"]] for row in rows) - sum(block_tokens)) / total


if __name__ == "__main__":
    main()
