"""Generate static shards, as scripts written by hand do: under torchrun each rank takes its own part of a file.

    torchrun --standalone --nproc-per-node 2 benchmarks/static_shards.py ROWS.jsonl OUT_DIR MODEL ENGINE [contiguous]

Each rank generates its rows (every n-th, or a contiguous chunk) with one `LLM.generate()`. It writes them as JSON
lines, with its seconds of generating beside them. Rank 0 joins the files. ENGINE is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    rows_path, out, model, engine, *flags = sys.argv[1:]
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    bind_to_device(rank, num_ranks)
    # vLLM must not take the launcher's variables for its own.
    prefixes = ("TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_")
    for name in [name for name in os.environ if name.startswith(prefixes) or name in ("RANK", "WORLD_SIZE")]:
        del os.environ[name]
    from vllm import LLM, SamplingParams

    rows = [json.loads(line) for line in Path(rows_path).read_text().splitlines()]
    chunk = -(-len(rows) // num_ranks)
    rows = rows[rank * chunk : (rank + 1) * chunk] if "contiguous" in flags else rows[rank::num_ranks]
    llm = LLM(model, **json.loads(engine))
    started_s = time.monotonic()
    params = [SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=row["budget"]) for row in rows]
    outputs = llm.generate([row["prompt"] for row in rows], params, use_tqdm=False)
    seconds = time.monotonic() - started_s
    texts = [output.outputs[0].text for output in outputs]
    write_part(Path(out), rank, [{**row, "text": text} for row, text in zip(rows, texts, strict=True)], seconds)
    if rank == 0:
        join_parts(Path(out), num_ranks)


def bind_to_device(rank: int, num_ranks: int) -> None:
    """Bind this process to its GPU, or without GPUs to its share of the cores."""
    if os.path.exists("/dev/nvidia0"):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["LOCAL_RANK"]
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[rank::num_ranks] or cores)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def write_part(out_dir: Path, rank: int, rows: list[dict[str, object]], seconds: float) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / f"{rank}.part").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out_dir / f"{rank}.seconds").write_text(str(seconds))
    os.rename(out_dir / f"{rank}.part", out_dir / f"{rank}.jsonl")


def join_parts(out_dir: Path, num_ranks: int) -> None:
    """Wait for all ranks' files, and join them."""
    while len(list(out_dir.glob("*.jsonl"))) < num_ranks:
        time.sleep(0.05)
    with (out_dir / "all").open("w") as joined:
        for path in sorted(out_dir.glob("*.jsonl")):
            joined.write(path.read_text())


if __name__ == "__main__":
    main()
