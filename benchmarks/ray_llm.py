"""Generate the same rows with Ray Data LLM, for jobs.py to compare with, in an environment that has ray[data].

    python benchmarks/ray_llm.py ROWS.jsonl OUT_DIR MODEL ENGINE REPLICAS

ENGINE is JSON. Follows Ray's documentation, and favours Ray where there is a choice: prompts go to vLLM as text,
without Ray's own stages for chat templates, tokens and their text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    rows_path, out_dir, model, engine, num_replicas = sys.argv[1:]
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    # More CPUs than there are: Ray's own small tasks want one each, and would wait for the engines.
    ray.init(num_cpus=4 * int(num_replicas), include_dashboard=False, log_to_driver=False)
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=json.loads(engine),
        concurrency=int(num_replicas),
        batch_size=64,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    process = build_processor(config, preprocess=make_request, postprocess=lambda row: {"text": row["generated_text"]})
    # Several blocks: a single one would go to one replica.
    process(ray.data.read_json(rows_path).repartition(8 * int(num_replicas))).write_json(out_dir)
    num_written = sum(len(path.read_text().splitlines()) for path in Path(out_dir).glob("*.json*"))
    num_rows = len(Path(rows_path).read_text().splitlines())
    if num_written != num_rows:
        sys.exit(f"Ray Data LLM wrote {num_written} of {num_rows} rows")


def make_request(row: dict[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "ignore_eos": True, "max_tokens": int(row["budget"])}
    return {"prompt": row["prompt"], "sampling_params": sampling}


if __name__ == "__main__":
    main()
