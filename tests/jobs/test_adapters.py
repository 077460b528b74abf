"""LoRA adapters: each row gets the text of its own adapter, on real vLLM and on the fake engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_input import BAD_ADAPTER_ROWS
from helpers.jobs import Launcher, load_result
from helpers.tiny_adapter import save_adapter
from helpers.tiny_model import ENGINE, save_tiny_model

QUESTIONS = ("hello there", "one two three", "what is this")
ADAPTERS = (None, "math", "code")

# Generates each question with each adapter, as a user of vLLM's own API does; the questions alone without any at first.
PEER = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, engine, folders, rows = sys.argv[1], *map(json.loads, sys.argv[2:])
    params = SamplingParams(temperature=0, max_tokens=12)
    plain = LLM(model, enable_chunked_prefill=False, **engine).generate([row["question"] for row in rows], params)
    # One slot more than adapters: vLLM's CPU build gives rows without an adapter that of the last slot.
    llm = LLM(model, enable_chunked_prefill=False, enable_lora=True, max_lora_rank=16, max_loras=3, **engine)
    loras = {name: LoRARequest(name, number + 7, folder) for number, (name, folder) in enumerate(folders.items())}
    outputs = llm.generate(
        [row["question"] for row in rows],
        params,
        lora_request=[loras.get(row["adapter"]) for row in rows],
    )
    print("RESULT " + json.dumps([[list(output.outputs[0].token_ids) for output in part] for part in (outputs, plain)]))
"""


def make_rows() -> list[dict[str, Any]]:
    return [{"question": question, "adapter": adapter} for question in QUESTIONS for adapter in ADAPTERS]


@pytest.mark.vllm
@pytest.mark.slow
def test_each_row_gets_the_tokens_that_vllm_generates_with_its_adapter(launcher: Launcher, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    folders = {
        "math": str(save_adapter(tmp_path / "math", seed=1)),
        "code": str(save_adapter(tmp_path / "code", seed=2, rank=12)),
    }
    rows = make_rows()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *(row for _, row, _, _ in BAD_ADAPTER_ROWS)]))
    changes = [
        *(f"model={model}", f"data.path={data}", "data.as_chat=false", "sampling={temperature: 0, max_tokens: 12}"),
        *(f"engine.{name}={value}".lower() for name, value in ENGINE.items()),
        *("output.token_ids=true", "run.engine=vllm", "sampling.from_columns={prompt_logprobs: scores}"),
    ]
    with_adapters = launcher.dpgen(
        *("run", "conf/lora.yaml", *changes, f"run.dir={tmp_path / 'run'}"),
        *(f"lora.{name}={folder}" for name, folder in folders.items()),
    )
    assert with_adapters.wait() == 0, with_adapters.output
    result = load_result(tmp_path / "run")
    for (what, _, error_type, words), row in zip(BAD_ADAPTER_ROWS, result[len(rows) :], strict=True):
        assert row["error"]["type"] == error_type and words in row["error"]["message"], f"{what}: {row['error']}"
    tokens = [row["generated_token_ids"] for row in result[: len(rows)]]
    assert all(len({str(ids) for ids in tokens[start : start + 3]}) == 3 for start in (0, 3, 6)), "adapters show"

    alone = launcher.start(
        [launcher.python, "-c", PEER, str(model), json.dumps(ENGINE), json.dumps(folders), json.dumps(rows)],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    assert alone.wait() == 0, alone.output
    line = next(line for line in alone.output.splitlines() if line.startswith("RESULT "))
    expected, plain = json.loads(line.removeprefix("RESULT "))
    assert tokens == expected
    assert tokens[::3] == plain[::3], "rows without an adapter are those of an engine without adapters"


def test_a_dry_run_shows_each_rows_adapter_and_the_order_where_slots_are_few(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    names = ["math", "code", "law", "art", "sport", None]
    rows = [{"prompt": f"question {number}", "adapter": names[number % 6]} for number in range(36)]
    rows[6] = {"prompt": "question 6", "adapter": "maths"}
    lora = {name: f"nowhere/{name}" for name in names if name}
    job = launcher.dpgen("run", write_config(rows, lora=lora, data={"lora_column": "adapter"}))
    assert job.wait() == 0, job.output
    assert ", one adapter after the other (5 adapters, 4 slots)" in job.output
    result = load_result(tmp_path / "run")
    error = result.pop(6)["error"]
    assert error["type"] == "unknown_adapter" and "did you mean 'math'" in error["message"]
    words = [row["generated_text"].split()[0] for row in result]
    assert [word if word in lora else None for word in words] == [row["adapter"] for row in result]


def test_a_single_adapter_is_used_for_all_rows_and_a_resumed_run_keeps_it(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path
) -> None:
    conf = write_config([{"prompt": "hello"}, {"prompt": "there"}], lora={"math": "nowhere/math"})
    job = launcher.dpgen("run", conf)
    assert job.wait() == 0, job.output
    assert [row["generated_text"].split()[0] for row in load_result(tmp_path / "run")] == ["math", "math"]
    other = launcher.dpgen("run", conf, "lora.math=elsewhere/math")
    assert other.wait() == 2
    assert 'lora.math: "nowhere/math" → "elsewhere/math"' in other.output
