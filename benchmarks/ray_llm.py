"""The same rows through Ray Data LLM, for the benchmarks to compare with; runs in an environment that has ray[data].

    python benchmarks/ray_llm.py ROWS.jsonl OUT_DIR MODEL ENGINE REPLICAS

ENGINE is JSON. Written as Ray's documentation has it, in its favour where there is a choice: prompts go to vLLM as
text, without stages of Ray's own for chat templates, tokens and their text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    rows, out, model, engine, replicas = sys.argv[1:]
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    # More than there are: Ray's own small tasks want one each, and would wait for the engines.
    ray.init(num_cpus=4 * int(replicas), include_dashboard=False, log_to_driver=False)
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=json.loads(engine),
        concurrency=int(replicas),
        batch_size=64,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    process = build_processor(config, preprocess=request, postprocess=lambda row: {"text": row["generated_text"]})
    # In blocks: one alone would all go to one replica.
    process(ray.data.read_json(rows).repartition(8 * int(replicas))).write_json(out)
    count = sum(len(each.read_text().splitlines()) for each in Path(out).glob("*.json*"))
    wanted = len(Path(rows).read_text().splitlines())
    if count != wanted:
        sys.exit(f"{count} rows came out, of {wanted}")


def request(row: dict[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "ignore_eos": True, "max_tokens": int(row["budget"])}
    return {"prompt": row["prompt"], "sampling_params": sampling}


if __name__ == "__main__":
    main()
