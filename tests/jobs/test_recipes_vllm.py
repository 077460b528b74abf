"""Recipes of engine options and of structured output, on real vLLM (its CPU build) with tiny models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO, Launcher, load_result
from helpers.kept_engine import KeptEngine
from helpers.tiny_model import ENGINE, quantize, save_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.multi, pytest.mark.xdist_group("engines")]  # one engine runs most recipes

DOCUMENT = "the quick brown fox jumps over the lazy dog " * 16  # more than a block of the KV cache, 128 tokens
QUESTIONS = [{"document": DOCUMENT, "question": f"hello {word}"} for word in ("fox", "dog", "world", "there")]
# Without blanks in JSON: a random model would write them for ever.
XGRAMMAR = {"backend": "xgrammar", "disable_any_whitespace": True}
OPTIONS = {**ENGINE, "max_model_len": 1024, "enable_prefix_caching": True, "structured_outputs_config": XGRAMMAR}
PROMPTS = [{"prompt": f"{row['document']}\n\nQuestion: {row['question']}\nAnswer:"} for row in QUESTIONS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "plain", max_model_len=1024)


@pytest.fixture
def run_recipe(kept_engine: KeptEngine, tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Run a shipped recipe over other rows and another model, and return the run directory."""

    def run(recipe: str, rows: list[dict[str, Any]], *overrides: str) -> Path:
        conf = str(REPO / "conf" / f"{recipe}.yaml")
        quiet = "run.log_level=error"
        return kept_engine.run_rows(tmp_path / f"run-{recipe}", rows, model, OPTIONS, conf, quiet, *overrides)

    return run


def test_speculation_and_the_prefix_cache_change_no_greedy_text(run_recipe: Callable[..., Path]) -> None:
    cached = run_recipe("prefix_caching", QUESTIONS, "sampling.max_tokens=40", "engine.max_num_seqs=1")
    facts = json.loads((cached / "run.json").read_text())
    assert facts["manifests"][0]["num_cached_tokens"] >= 3 * 128, "later rows found the document in the cache"
    speculative = run_recipe("speculative", PROMPTS, "data.as_chat=false", "sampling.max_tokens=40")
    texts = [[row["generated_text"] for row in load_result(run)] for run in (cached, speculative)]
    assert texts[0] == texts[1] and all(texts[0])


def test_a_quantized_model_runs_and_answers_follow_the_schema(
    run_recipe: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    quantized = Path(shutil.copytree(model, tmp_path / "quantized"))
    quantize(quantized)
    own_constraint = '{"choice": ["yes", "no"]}'
    rows: list[dict[str, Any]] = [
        {"prompt": "hello", "constraint": None},
        {"prompt": "the fox", "constraint": own_constraint},
    ]
    overrides = [
        f"model={quantized}",
        "data.as_chat=false",
        "sampling.max_tokens=200",
        "output.schema=@conf/schemas/review.json",
        "sampling.from_columns={structured_outputs: constraint}",
        "sampling.temperature=0",
    ]
    run = run_recipe("quantized", rows, *overrides)
    answer, own = load_result(run)
    if answer["finish_reason"] == "stop":  # a random model may not come to an end
        assert answer["parse_error"] is None and answer["parsed"] == json.loads(answer["generated_text"])
    assert re.match(r'\{"sentiment": ?"', answer["generated_text"])
    assert own["generated_text"] in ("yes", "no") and own["parsed"] is None, "a row's own constraint has precedence"
    assert own["parse_error"].startswith("no JSON: ")


def test_each_sample_of_a_prompt_of_token_ids_is_a_row(run_recipe: Callable[..., Path]) -> None:
    rows = [{"tokens": [5, 6, 7]}, {"tokens": [9, 10]}, {"tokens": [100_000]}]
    run = run_recipe("samples", rows, "sampling.n=3", "sampling.max_tokens=9")
    result = load_result(run)
    assert [(row["row_id"], row["sample_id"]) for row in result] == [
        *((0, n) for n in range(3)),
        *((1, n) for n in range(3)),
        (2, None),
    ]
    assert [row["num_prompt_tokens"] for row in result[:6]] == [3] * 3 + [2] * 3
    assert len({str(row["generated_token_ids"]) for row in result[:6]}) == 6 and "tokens" not in result[0]
    assert result[6]["error"]["type"] == "out_of_vocabulary"


# Checks the options of each recipe as the engine process does before it loads a model.
CHECK_OPTIONS = """
import json, sys
from dpgen.config.loader import load_from_args
from dpgen.distributed.topology import Topology
from dpgen.engine.starting.launch import build_engine_spec
from dpgen.engine.vllm.vllm_backend import VllmBackend

for words in json.loads(sys.argv[1]):
    VllmBackend(build_engine_spec(load_from_args(words), Topology(), None)).check_options()
print("all accepted")
"""


def test_vllm_accepts_the_options_of_recipes_that_need_a_gpu(launcher: Launcher, model: Path) -> None:
    words = [
        [str(REPO / "conf" / f"{name}.yaml"), f"model={model}", "engine.max_model_len=1024"]
        for name in ("kv_offload", "structured")
    ]
    job = launcher.start([launcher.python, "-c", CHECK_OPTIONS, json.dumps(words)])
    assert job.wait() == 0 and "all accepted" in job.output, job.output


def test_each_ready_program_runs_with_its_recipe(run_recipe: Callable[..., Path]) -> None:
    """A model of random weights says nothing sensible: what is generated is checked by its form."""
    few = ["sampling.max_tokens=24", "data.chat_template_kwargs={}", "run.report=false"]
    questions = [{"question": f"hello {word}"} for word in ("fox", "dog")]

    def run(recipe: str, rows: list[dict[str, Any]], *overrides: str) -> list[dict[str, Any]]:
        result = load_result(run_recipe(recipe, rows, *few, *overrides))
        errors = [row["error"] for row in result if row["error"]]
        assert not errors, errors
        return result

    for row in run("critique", questions):
        assert row["draft"] and row["final"] and row["num_calls"] == 3
    for row in run("self_consistency", questions, "program.options={num_answers: 3, pattern: '[a-z]'}"):
        assert len(set(row["texts"])) == 3 and row["num_votes"] >= 1 and row["num_calls"] == 1
    for row in run("user_simulation", [{"persona": "a fox"}], "program.options.num_turns=2"):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
        assert row["num_calls"] == 4
    for row in run("pairwise_judge", [{"question": "why?", "answer_a": "fox", "answer_b": "dog"}]):
        assert row["winner"] in ("A", "B", "tie") and set(row["verdicts"]) <= {"A", "B", "tie"}
    rewards = run("best_of_n", questions, "program.options={num_answers: 3, reward: likelihood}")
    for row in rewards:
        assert row["num_calls"] == 4 and row["reward"] == max(row["rewards"]) < 0
        assert row["best"] == row["texts"][row["rewards"].index(row["reward"])]
    tools = ["sampling={temperature: 1, max_tokens: 300}", "program.options={max_input_chars: 12, max_steps: 2}"]
    results = run("tool_loop", [{"question": f"hello {number}"} for number in range(6)], *tools)
    steps = [step for row in results for step in json.loads(row["steps"])]
    assert steps and all(step["action"] == "calculate" and step["result"] for step in steps)
