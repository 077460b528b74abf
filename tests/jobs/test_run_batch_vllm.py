"""`dpgen run-batch` and `vllm run-batch` answer the same file with the same flags, and alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.batch_files import make_chat, make_completion, read_responses, write_batch
from helpers.jobs import Launcher
from helpers.tiny_model import save_tiny_model

from dpgen.output.verification import verify

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FLAGS = (
    *("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "64000000", "--no-enable-chunked-prefill"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
# What responses have of themselves: see "Response files" in conf/README.md.
OWN_FIELDS = ("id", "created", "system_fingerprint", "prompt_token_ids")
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["yes"]}}, "required": ["a"], "additionalProperties": False}
BODIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "logprobs alone": {"logprobs": True},
    "logprobs of sampled tokens": {"logprobs": True, "top_logprobs": 3, "temperature": 1.5, "seed": 7},
    "two samples": {"n": 2, "temperature": 1.0, "seed": 3},
    "max_completion_tokens": {"max_completion_tokens": 5},
    "json": {"response_format": {"type": "json_object"}, "max_tokens": 20},
    "schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "max_tokens": 20,
    },
    "choice": {"structured_outputs": {"choice": ["yes", "no"]}},
    "tools": {"tools": [TOOL]},
    "a required call": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 40},
    "a named call": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "max_tokens": 40,
    },
    "no call": {"tools": [TOOL], "tool_choice": "none"},
    "stop tokens": {"stop_token_ids": list(range(3, 300))},
    "a stop string": {"stop": ["e", "o"], "logit_bias": {"266": 60}},
    "logit_bias": {"logit_bias": {"5": 100}},
    "token ids": {"return_token_ids": True},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    },
    "template kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
    "special tokens": {"skip_special_tokens": False, "logit_bias": {"1": 100}},
    "penalties": {"top_k": 3, "presence_penalty": 0.5, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
    "a field that nobody knows": {"frobnicate": 1, "user": "me", "metadata": {"a": "b"}},
    "no model": {"model": None},
    "an unknown model": {"model": "nope"},
    "too long": {"messages": [{"role": "user", "content": "hello " * 400}]},
    "bad temperature": {"temperature": -1},
    "too many tokens": {"max_tokens": 5000},
    "no messages": {"messages": []},
    "a bad schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frob"}}}
    },
}


def make_lines() -> list[str]:
    return [make_chat(name, **{"model": "tiny", "temperature": 0, **body}) for name, body in BODIES.items()]


def drop_own(body: dict[str, Any]) -> dict[str, Any]:
    """Return a response body without what is its own, the random ids of calls included."""
    kept = {key: value for key, value in body.items() if key not in OWN_FIELDS}
    for choice in kept["choices"]:
        for call in choice["message"].get("tool_calls", ()):
            call["id"] = "call"
    return kept


def is_near(one: Any, other: Any) -> bool:
    """Return True if two values are the same, but for the last digits of numbers."""
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, abs=1e-4)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(is_near(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_near, one, other))
    return bool(one == other)


def test_responses_are_those_of_vllm_run_batch(launcher: Launcher, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "plain")
    source = write_batch(tmp_path / "in.jsonl", make_lines())
    command = ("-i", str(source), "--model", str(model), *FLAGS)
    program = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    peer = launcher.start([*program, *command, "-o", str(tmp_path / "vllm.jsonl")], VLLM_NO_USAGE_STATS="1")
    assert peer.wait() == 0, peer.output
    # vLLM has no completions in batch files. The tokens are those of the prompt of "plain".
    token_ids = [0, 292, 201, 266, 1, 201, 0, 268, 311, 201]
    completion = make_completion("completion", token_ids, model="tiny", temperature=0, logprobs=1)
    write_batch(source, [*make_lines(), completion])
    recipe = ("conf/batch.yaml", "run.dir=" + str(tmp_path / "dpgen.jsonl.run"))
    job = launcher.dpgen("run-batch", *command, "-o", str(tmp_path / "dpgen.jsonl"), *recipe)
    assert job.wait() == 0, job.output
    expected = [json.loads(line) for line in (tmp_path / "vllm.jsonl").read_text().splitlines()]
    *responses, last = read_responses(tmp_path / "dpgen.jsonl")
    different = {}
    for theirs, ours in zip(expected, responses, strict=True):
        assert list(ours) == list(theirs) and list(ours["response"]) == list(theirs["response"])
        assert ours["custom_id"] == theirs["custom_id"]
        bodies = [response["response"]["body"] for response in (theirs, ours)]
        if theirs["response"]["status_code"] == 200 and bodies[1] is not None:
            assert all(bodies)
            if not is_near(*map(drop_own, bodies)):
                different[ours["custom_id"]] = bodies
        elif theirs["response"]["status_code"] != ours["response"]["status_code"]:
            different[ours["custom_id"]] = [theirs["error"], ours["error"]]
        else:
            assert {*theirs["error"]["error"], "error_type"} == set(ours["error"]["error"])
            assert theirs["error"]["error"]["type"] == ours["error"]["error"]["type"]
    assert not different
    [choice], [plain] = last["response"]["body"]["choices"], responses[0]["response"]["body"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (plain["message"]["content"], plain["finish_reason"])
    assert len(choice["logprobs"]["tokens"]) == 8
    assert verify(tmp_path / "dpgen.jsonl.run").verdict == "sound"
