"""Generate a file of rows with one `LLM.generate()`, as a script does, and print its seconds.

python benchmarks/llm_generate.py ROWS.jsonl MODEL ENGINE_JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def time_generate(llm: Any, rows: list[dict[str, Any]], chunk_rows: int | None = None) -> float:
    """Return the seconds in which an `LLM` generates rows of `measure.make_rows`.

    Args:
        chunk_rows: rows in a call of `generate`; None for all.
    """
    from vllm import SamplingParams

    started_s, num_texts = time.monotonic(), 0
    for start in range(0, len(rows), chunk_rows or len(rows)):
        chunk = rows[start : start + (chunk_rows or len(rows))]
        params = [SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=row["budget"]) for row in chunk]
        outputs = llm.generate([row["prompt"] for row in chunk], params, use_tqdm=False)
        num_texts += len([output.outputs[0].text for output in outputs])
    seconds = time.monotonic() - started_s
    assert num_texts == len(rows)
    return seconds


def main() -> None:
    path, model, engine = sys.argv[1:]
    from vllm import LLM

    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    print(f"SECONDS {time_generate(LLM(model, **json.loads(engine)), rows)}")


if __name__ == "__main__":
    main()
