"""Compare dpgen, with durable rows, with vLLM's `LLM.embed()`: the same texts, the same core.

    python benchmarks/embed.py [--rows 2000] [--rounds 5] [--max-words 60]
    python benchmarks/embed.py --shape minilm --rows 1000 --ranks 2                          # a core for each rank
    python benchmarks/embed.py --model BAAI/bge-base-en-v1.5 --device gpu --rows 100000      # on a GPU

Ways:
- embed: `LLM.embed()` in one call; a process of one core
- dpgen: a run over the same file (see `loaded_engines`): plan, tokenize, admission, engine process, journal. Of
  several ranks each has a core, which its engine shares; the slowest one's time counts

Texts are of 1 to `--max-words` words, most of them short. Every round times both in turn. Start-up is not timed.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from loaded_engines import Peer, print_heading, print_table, serve_llm, serve_ranks
from measure import (
    REPO,
    add_engine_options,
    compute_ratio,
    make_parser,
    measure_in_turn,
    run_engine_benchmark,
    write_rows,
)

ENGINE = {"dtype": "float32", "max_num_seqs": 64, "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
}


def main() -> None:
    run_engine_benchmark("embed", parse_options(), ENGINE, measure)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_engine_options(parser, 2000, "the tests' tiny BERT")
    parser.add_argument("--max-words", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=1, help="of dpgen")
    parser.add_argument(
        "--shape", choices=SHAPES, default="tiny", help="of a random BERT: the tests', or that of all-MiniLM-L6-v2"
    )
    return parser.parse_args()


def measure(options: argparse.Namespace, engine: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    model = str(options.model or make_bert(work_dir, SHAPES[options.shape]))
    path = write_rows(work_dir / "texts.jsonl", make_texts(options.rows, options.max_words))
    settings = partial(list_settings, str(work_dir), model, engine)
    with (
        Peer(serve_ranks, options, work_dir, settings, num_processes=options.ranks) as dpgen,
        Peer(serve_llm, options, work_dir, model, engine, embed) as llm,
    ):
        ways: dict[str, Callable[[], float]] = {
            "dpgen": lambda: dpgen.time("dpgen", path),
            "embed": lambda: llm.time("embed", path),
        }
        for time_pass in ways.values():
            time_pass()  # a warm-up
        seconds = measure_in_turn(ways, options.rounds)
    processor_s = {way: peer.total_processor_s[1:] for way, peer in (("dpgen", dpgen), ("embed", llm))}
    ratio, processor_ratio = (compute_ratio(found["embed"], found["dpgen"]) for found in (seconds, processor_s))
    print_heading("ranks", "rows/s")
    print_table(str(options.ranks), seconds, options.rows, {"embed": ratio})
    print(f"processor time of LLM.embed over that of dpgen, engines included: {processor_ratio}")
    rounded = {way: [round(time_s, 3) for time_s in times_s] for way, times_s in seconds.items()}
    facts = {"rows": options.rows, "ranks": options.ranks, "shape": options.shape, "seconds": rounded}
    facts["rank_processor_s"] = round(dpgen.processor_s, 3)
    return {**facts, "embed_over_dpgen": ratio, "processor_time_of_embed_over_dpgen": processor_ratio}


def make_bert(work_dir: Path, shape: dict[str, int]) -> Path:
    """Write the tests' BERT, or one of another shape."""
    sys.path.insert(0, str(REPO / "tests"))
    from helpers.tiny_pooling import save_tiny_pooling

    model: Path = save_tiny_pooling("bert", work_dir / "model", **shape)
    return model


def make_texts(num_rows: int, max_words: int) -> list[dict[str, str]]:
    """Return texts of 1 to `max_words` words, which are one token each."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    chance = random.Random(0)
    lengths = [max(1, round(max_words * chance.random() ** 2)) for _ in range(num_rows)]
    return [{"prompt": " ".join(chance.choice(words) for _ in range(length))} for length in lengths]


def embed(llm: Any, way: str, rows: list[dict[str, Any]]) -> float:
    """Embed with `LLM.embed()` as its users call it; return the seconds."""
    texts = [row["prompt"] for row in rows]
    started_s = time.monotonic()
    outputs = llm.embed(texts, use_tqdm=False)
    seconds = time.monotonic() - started_s
    assert len(outputs) == len(rows)
    return seconds


def list_settings(work_dir: str, model: str, engine: dict[str, Any], way: str, path: str) -> list[str]:
    """Return the arguments of `dpgen run`."""
    settings = [f"model={model}", "task=embed", "data.prompt_column=prompt", f"engine={json.dumps(engine)}"]
    return [*settings, f"run.dir={work_dir}/run", f"data.path={path}", "parallel.engines_per_rank=1"]


if __name__ == "__main__":
    main()
