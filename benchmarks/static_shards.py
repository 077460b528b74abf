"""What people write by hand, for the benchmarks to compare with: under torchrun each rank's own piece of a file.

    torchrun --standalone --nproc-per-node 2 benchmarks/static_shards.py ROWS.jsonl OUT_DIR MODEL ENGINE [contiguous]

Each rank generates its rows (every n-th, or a contiguous piece) with one `LLM.generate()`, writes them as JSON lines,
and leaves its seconds of generating beside them; rank 0 puts the files together. ENGINE is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    rows_path, out, model, engine, *more = sys.argv[1:]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.path.exists("/dev/nvidia0"):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["LOCAL_RANK"]
    else:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[rank::size] or cores)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_"))]:
        del os.environ[name]
    world = {"RANK": os.environ.pop("RANK"), "WORLD_SIZE": os.environ.pop("WORLD_SIZE")}
    from vllm import LLM, SamplingParams

    rows = [json.loads(line) for line in Path(rows_path).read_text().splitlines()]
    piece = -(-len(rows) // size)
    mine = rows[rank * piece : (rank + 1) * piece] if "contiguous" in more else rows[rank::size]
    llm = LLM(model, **json.loads(engine))
    started_s = time.monotonic()
    params = [SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=row["budget"]) for row in mine]
    outputs = llm.generate([row["prompt"] for row in mine], params, use_tqdm=False)
    seconds = time.monotonic() - started_s
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(
        json.dumps({**row, "text": each.outputs[0].text}) + "\n" for row, each in zip(mine, outputs, strict=True)
    )
    (folder / f"{world['RANK']}.part").write_text(text)
    (folder / f"{world['RANK']}.seconds").write_text(str(seconds))
    os.rename(folder / f"{world['RANK']}.part", folder / f"{world['RANK']}.jsonl")
    if world["RANK"] == "0":
        while len(list(folder.glob("*.jsonl"))) < size:
            time.sleep(0.05)
        with (folder / "all").open("w") as joined:
            for each in sorted(folder.glob("*.jsonl")):
                joined.write(each.read_text())


if __name__ == "__main__":
    main()
