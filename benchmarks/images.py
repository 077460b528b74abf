"""Show that the engine does not wait for images: dpgen's workers, `LLM.chat()`, and rows that were preprocessed before.

    python benchmarks/images.py [--rows 96] [--rounds 3] [--sleep-s 0.25] [--workers 4] [--max-tokens 256]
    python benchmarks/images.py --model Qwen/Qwen2.5-VL-7B-Instruct --device gpu --rows 2000 --sleep-s 0 --workers 8

The tests' tiny vision-language model on vLLM's CPU build. Its image processor is made slow by sleeping, so that two
cores can show what many would. Each image is another one, and nothing is cached.

- prepared: `LLM.generate()` over inputs that vLLM's own renderer has made before; only generation is timed.
- dpgen: a run over the same rows (see `loaded_engines`), its workers preprocess while its engine generates.
- chat: `LLM.chat()`, which preprocesses all rows one after the other, and generates then.

Engines run on one core; dpgen's workers and rank may use the others. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
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

ENGINE = {
    **{"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True},
    **{"kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": False, "mm_processor_cache_gb": 0},
}
# Makes the image processor of the tests' model sleep, in each process that has this folder in its PYTHONPATH.
SLOW = """
import importlib.util, os, sys, time

TARGET = "transformers.models.idefics3.image_processing_pil_idefics3"


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            preprocess = module.Idefics3ImageProcessorPil.preprocess

            def sleep_first(self, *args, **options):
                time.sleep(float(os.environ["BENCHMARK_SLEEP_S"]))
                return preprocess(self, *args, **options)

            module.Idefics3ImageProcessorPil.preprocess = sleep_first

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


def main() -> None:
    run_engine_benchmark("images", parse_options(), ENGINE, measure)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_engine_options(parser, 96, "the tests' tiny Idefics3")
    parser.add_argument("--sleep-s", type=float, default=0.25, help="for each image; of the tests' model only")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.set_defaults(rounds=3)
    return parser.parse_args()


def measure(options: argparse.Namespace, engine: dict[str, Any], work_dir: Path) -> dict[str, Any]:
    sys.path.insert(0, str(REPO / "tests"))
    from helpers.tiny_vision import make_image, save_tiny_vision

    model = str(options.model or save_tiny_vision(work_dir / "model"))
    rows = []
    for row in range(options.rows):
        image = base64.b64encode(make_image(row, (40 + row, 60))).decode()
        rows.append({"question": f"what is {row}", "image": f"data:image/png;base64,{image}"})
    path = write_rows(work_dir / "rows.jsonl", rows)
    (work_dir / "slow").mkdir()
    (work_dir / "slow" / "sitecustomize.py").write_text(SLOW)
    # For the processes that this one starts, and for theirs.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(work_dir / "slow"), *(path for path in sys.path if path)])
    os.environ["BENCHMARK_SLEEP_S"] = str(options.sleep_s)
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": options.max_tokens}
    common = [f"model={model}", f"engine={json.dumps(engine)}", f"sampling={json.dumps(sampling)}"]
    common += [f"data.media_workers={options.workers}", f"data.media_dir={work_dir}", f"run.dir={work_dir}/run"]
    settings = partial(list_settings, common)
    with (
        Peer(serve_ranks, options, work_dir, settings) as dpgen,
        Peer(serve_llm, options, work_dir, model, engine, Reference(options.max_tokens)) as llm,
    ):
        ways: dict[str, Callable[[], float]] = {
            "prepared": lambda: llm.time("prepared", path),
            "dpgen": lambda: dpgen.time("dpgen", path),
            "chat": lambda: llm.time("chat", path),
        }
        for time_pass in ways.values():
            time_pass()  # a warm-up
        seconds = measure_in_turn(ways, options.rounds)
    ratios = {name: compute_ratio(seconds[name], seconds["dpgen"]) for name in ("prepared", "chat")}
    print_heading("workers", "rows/s")
    print_table(str(options.workers), seconds, options.rows, ratios)
    facts = {name: getattr(options, name) for name in ("rows", "workers", "sleep_s", "max_tokens")}
    rounded = {name: [round(time_s, 3) for time_s in times_s] for name, times_s in seconds.items()}
    return {**facts, "seconds": rounded, "dpgen_over_prepared": ratios["prepared"], "dpgen_over_chat": ratios["chat"]}


class Reference:
    """Generate with vLLM as its users call it: over chats, or over what its renderer has made of them before."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._inputs: list[Any] = []

    def __call__(self, llm: Any, way: str, rows: list[dict[str, Any]]) -> float:
        """Return the seconds."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=self._max_tokens)
        chats = [_make_chat(row) for row in rows]
        if way == "prepared" and not self._inputs:
            self._inputs = list(llm._preprocess_chat(chats))
        started_s = time.monotonic()
        if way == "prepared":
            outputs = llm.generate([dict(made) for made in self._inputs], params, use_tqdm=False)
        else:
            outputs = llm.chat(chats, params, use_tqdm=False)
        seconds = time.monotonic() - started_s
        assert len(outputs) == len(rows)
        return seconds


def _make_chat(row: dict[str, Any]) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": row["image"]}}
    return [{"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}]


def list_settings(common: list[str], way: str, path: str) -> list[str]:
    """Return the arguments of `dpgen run`."""
    prompt = ["data.prompt_column=question", "data.as_chat=true", "data.images_column=image"]
    return [*common, *prompt, f"data.path={path}", "parallel.engines_per_rank=1"]


if __name__ == "__main__":
    main()
