"""Few long documents, many questions about each, in random order: what `work.order=prefix` is worth.

    python benchmarks/prefix.py [--documents 64] [--questions 24] [--rounds 5]

Whole runs of one rank on one core, prefill-bound (two tokens are generated of prompts of some hundred), with a KV cache
that holds a part of the documents. Alternately with `work.order=prefix` and with `dataset`. Compared are the seconds
from the first row to the last, and how much of the prompts came from vLLM's prefix cache: ideal is every token of a
document but in its first row, in whole blocks.

A table for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import TINY_ENGINE, WORDS, interleaved, machine, ratio, timed, tiny_model, write_rows

_DOCUMENT_WORDS = 320
_BLOCK_TOKENS = 32  # the smallest that attention on the CPU takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where to write; the system's temporary folder by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        found = measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"benchmark": "prefix", **machine(), "found": found}))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, choose = tiny_model(folder), random.Random(0)
    documents = [" ".join(choose.choices(WORDS, k=_DOCUMENT_WORDS)) for _ in range(options.documents)]
    rows = [
        {"prompt": f"{text} question {number} {' '.join(choose.choices(WORDS, k=5))}", "document": document}
        for document, text in enumerate(documents)
        for number in range(options.questions)
    ]
    choose.shuffle(rows)
    data = write_rows(folder / "rows.jsonl", rows)
    ideal = ideal_share(model, rows, documents)
    # Room for ten documents or so, beside what the running rows need.
    engine = {**TINY_ENGINE, "max_num_seqs": 16, "kv_cache_memory_bytes": 20 << 20, "block_size": _BLOCK_TOKENS}
    shares: dict[str, list[float]] = {"prefix": [], "dataset": []}

    def run(order: str) -> float:
        run_dir = folder / f"{order}-{len(shares[order])}"
        words = [f"run.dir={run_dir}", f"model={model}", f"data.path={data}", "data.prompt_column=prompt"]
        words += ["sampling.ignore_eos=true", "sampling.max_tokens=2", f"work.order={order}"]
        command = ["taskset", "-c", "0", sys.executable, "-m", "dpgen", "run", *words, f"engine={json.dumps(engine)}"]
        timed(command, run_dir.with_suffix(".log"), HF_HOME=str(folder / "hf"))
        [rank] = json.loads((run_dir / "run.json").read_text())["manifests"]
        shares[order].append(rank["num_cached_tokens"] / rank["num_prompt_tokens"])
        return float(rank["busy_s"])

    seconds = interleaved({order: (lambda order=order: run(order)) for order in shares}, options.rounds)
    faster = ratio(seconds["dataset"], seconds["prefix"])
    print(f"{'order':<10} {'seconds':>9} {'from the cache':>15} {'of the ideal':>13}")
    for order, each in seconds.items():
        share = sorted(shares[order])[len(shares[order]) // 2]
        print(f"{order:<10} {sorted(each)[len(each) // 2]:>9.2f} {share:>15.3f} {share / ideal:>13.3f}")
    print(f"dataset takes {faster['median']:.2f} times as long ({faster['min']:.2f} to {faster['max']:.2f})")
    return {"seconds": seconds, "dataset_over_prefix": faster, "shares": shares, "ideal_share": round(ideal, 4)}


def ideal_share(model: Path, rows: list[dict[str, Any]], documents: list[str]) -> float:
    """Of all prompt tokens, those in whole blocks that only documents fill, but for each document's first row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    blocks = [len(tokenizer(text)["input_ids"]) // _BLOCK_TOKENS * _BLOCK_TOKENS for text in documents]
    total = sum(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
    return sum(blocks[row["document"]] for row in rows) / total - sum(blocks) / total


if __name__ == "__main__":
    main()
