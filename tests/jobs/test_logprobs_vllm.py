"""Whole runs on real vLLM (its CPU build): the texts of LLM.generate, and its log-probabilities and transformers'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.jobs import REPO, Launcher, load_result
from helpers.kept_engine import KeptEngine
from helpers.tiny_model import ENGINE

pytestmark = [pytest.mark.vllm, pytest.mark.multi, pytest.mark.xdist_group("engines")]  # one engine runs all

WORDS = "the quick brown fox jumps over the lazy dog"
PROMPTS = [WORDS[: 3 + 7 * index] for index in range(6)]
ANSWERS = [" hello there", "world", " a", " jumps over the lazy dog", " the quick", " brown fox"]
TOLERANCE = 2e-4  # batches are made up differently

# Prints what LLM.generate returns for each prompt: for generating, and for the token ids of prompt and answer.
PEER = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt

def to_lists(logprobs):
    return [None if top is None else [[token, entry.logprob] for token, entry in top.items()] for top in logprobs]

if __name__ == "__main__":
    model, engine, prompts, pairs = sys.argv[1], *map(json.loads, sys.argv[2:])
    llm = LLM(model, enable_chunked_prefill=False, **engine)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2)
    rows = []
    for output in llm.generate(prompts, params):
        sample = output.outputs[0]
        rows.append({
            "text": sample.text, "ids": list(sample.token_ids), "sum": sample.cumulative_logprob,
            "top": to_lists(sample.logprobs), "prompt": to_lists(output.prompt_logprobs),
        })
    scores = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in pairs],
                          SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    plain = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    texts = [[list(output.outputs[0].token_ids), output.outputs[0].text] for output in plain]
    print("RESULT " + json.dumps([rows, [to_lists(output.prompt_logprobs) for output in scores], texts]))
"""


@pytest.fixture
def run_recipe(kept_engine: KeptEngine, plain_model: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a shipped recipe over other rows and another model, and return the result's rows."""

    def run(recipe: str, rows: list[dict[str, Any]], *overrides: str) -> list[Any]:
        conf = str(REPO / "conf" / f"{recipe}.yaml")
        run_dir = tmp_path / recipe
        kept_engine.run_rows(run_dir, rows, plain_model, ENGINE, conf, "run.log_level=error", *overrides)
        return load_result(run_dir)

    return run


def assert_same_tokens(expected: list[list[list[float]]], ids: list[int], logprobs: list[float], k: int) -> None:
    """Compare flat candidates with those of vLLM, which leaves the token itself out of them where it is one."""
    for token, row_ids, row_logprobs in zip(
        expected, np.reshape(ids, (-1, k)), np.reshape(logprobs, (-1, k)), strict=True
    ):
        assert (np.diff(row_logprobs) <= 0).all(), "the most likely one comes first"
        known = dict(zip(row_ids.tolist(), row_logprobs.tolist(), strict=True))
        top = {int(token_id): logprob for token_id, logprob in token}
        assert set(known) <= set(top)
        assert all(abs(known[token_id] - top[token_id]) < TOLERANCE for token_id in known)


class TransformersPeer:
    """Compute with transformers what a model makes of completions."""

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.llm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def compute(self, prompt_ids: list[int], completion_ids: list[int]) -> tuple[list[float], bool]:
        """Return the log-probabilities of a completion's tokens, and whether each is the most likely one."""
        import torch

        with torch.no_grad():
            logits = self.llm(torch.tensor([prompt_ids + completion_ids])).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1)[len(prompt_ids) - 1 : -1]
        is_greedy = logprobs.argmax(dim=-1).tolist() == completion_ids
        return [float(logprobs[index, token]) for index, token in enumerate(completion_ids)], is_greedy

    def encode(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt and of the answer, as the tokenizer makes them of both texts together."""
        prompt = f"Question: {row['question']}\nAnswer:"
        prompt_ids, both = self.tokenizer(prompt)["input_ids"], self.tokenizer(prompt + row["answer"])["input_ids"]
        if both[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, both[len(prompt_ids) :]
        return prompt_ids, self.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]

    def find_greedy_row(self) -> dict[str, Any]:
        """Return a row whose answer is the text of the most likely token."""
        import torch

        for index in range(100):
            row = {"question": f"x{index}", "answer": " a"}
            prompt_ids, _ = self.encode(row)
            with torch.no_grad():
                token = int(self.llm(torch.tensor([prompt_ids])).logits[0, -1].argmax())
            row["answer"] = self.tokenizer.decode([token])
            if row["answer"] and self.encode(row) == (prompt_ids, [token]):
                return row
        raise AssertionError("the text of no likely token becomes that token again")


@dataclass
class Answers:
    """Hold what vLLM and transformers themselves make of the rows.

    Attributes:
        scored_rows: the rows of the recipe `score`, and `pairs` their tokens: of the prompt, and of the answer.
        rows, scores, texts: what the peer prints: of the prompts, of the pairs, and of the prompts alone.
    """

    transformers: TransformersPeer
    scored_rows: list[dict[str, Any]]
    pairs: list[tuple[list[int], list[int]]]
    rows: list[Any]
    scores: list[Any]
    texts: list[Any]


@pytest.fixture(scope="module")
def answers(plain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    transformers = TransformersPeer(plain_model)
    rows = [{"question": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    rows.append(transformers.find_greedy_row())
    pairs = [transformers.encode(row) for row in rows]
    launcher = Launcher(tmp_path_factory.mktemp("peer"))
    peer = launcher.folder / "peer.py"
    peer.write_text(PEER)
    sequences = [prompt + completion for prompt, completion in pairs]
    arguments = [str(plain_model), *map(json.dumps, (ENGINE, PROMPTS, sequences))]
    job = launcher.start(
        [launcher.python, str(peer), *arguments],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    try:
        assert job.wait() == 0, job.output
    finally:
        job.end()
    line = next(line for line in job.output.splitlines() if line.startswith("RESULT "))
    return Answers(transformers, rows, pairs, *json.loads(line.removeprefix("RESULT ")))


def test_a_run_generates_what_llm_generate_does(
    kept_engine: KeptEngine, plain_model: Path, tmp_path: Path, answers: Answers
) -> None:
    options = ("data.prompt_column=prompt", "sampling={temperature: 0, max_tokens: 12}", "output.token_ids=true")
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    rows = load_result(kept_engine.run_rows(tmp_path / "run", prompts, plain_model, ENGINE, *options))
    assert [[row["generated_token_ids"], row["generated_text"]] for row in rows] == answers.texts


def test_a_run_keeps_the_log_probabilities_that_vllm_and_transformers_compute(
    run_recipe: Callable[..., list[Any]], answers: Answers
) -> None:
    generated = run_recipe(
        "logprobs",
        [{"prompt": prompt, "stop": ["zzz"] if index % 2 else None} for index, prompt in enumerate(PROMPTS)],
        *("data.as_chat=false", "sampling.temperature=0", "sampling.max_tokens=8"),
        *("sampling.logprobs=3", "sampling.prompt_logprobs=2", "sampling.from_columns={stop: stop}"),
    )
    scored = run_recipe("score", [*answers.scored_rows, {"question": "x", "answer": "word " * 400}])

    for row, expected in zip(generated, answers.rows, strict=True):
        assert row["generated_text"] == expected["text"]
        assert row["generated_token_ids"] == expected["ids"]
        own = [dict(map(tuple, top))[token] for top, token in zip(expected["top"], expected["ids"], strict=True)]
        assert row["token_logprobs"] == pytest.approx(own, abs=TOLERANCE)
        assert row["cumulative_logprob"] == pytest.approx(expected["sum"], abs=8 * TOLERANCE)
        assert_same_tokens(expected["top"], row["top_token_ids"], row["top_logprobs"], 3)
        prompt_ids, logprobs = row["prompt_token_ids"], row["prompt_logprobs"]
        assert expected["prompt"][0] is None and logprobs[0] is None and row["prompt_top_token_ids"][:2] == [-1, -1]
        own = [dict(map(tuple, top))[token] for top, token in zip(expected["prompt"][1:], prompt_ids[1:], strict=True)]
        assert logprobs[1:] == pytest.approx(own, abs=TOLERANCE)
        assert_same_tokens(expected["prompt"][1:], row["prompt_top_token_ids"][2:], row["prompt_top_logprobs"][2:], 2)

    *scored, too_long = scored
    assert too_long["error"]["type"] == "prompt_too_long" and too_long["completion_logprob"] is None
    assert "generated_text" not in scored[0]
    for row, (prompt_ids, completion_ids), expected in zip(scored, answers.pairs, answers.scores, strict=True):
        assert row["error"] is None and row["num_prompt_tokens"] == len(prompt_ids)
        assert row["completion_token_ids"] == completion_ids
        own = [top[0][1] for top in expected[len(prompt_ids) :]]
        assert row["completion_token_logprobs"] == pytest.approx(own, abs=TOLERANCE)
        theirs, is_greedy = answers.transformers.compute(prompt_ids, completion_ids)
        assert row["completion_token_logprobs"] == pytest.approx(theirs, abs=1e-3)
        assert row["completion_logprob"] == pytest.approx(math.fsum(theirs), abs=1e-2)
        assert row["completion_is_greedy"] is is_greedy
    assert scored[-1]["completion_is_greedy"], "the last answer is the most likely token"
