"""`dpgen run-batch` and `vllm run-batch` answer the same file with the same flags, and alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.batch_files import (
    decode_embeddings,
    make_chat,
    make_completion,
    make_embeddings,
    read_responses,
    write_batch,
)
from helpers.jobs import Launcher
from helpers.tiny_adapter import save_adapter
from helpers.tiny_model import save_tiny_model
from helpers.tiny_pooling import save_tiny_pooling
from helpers.vllm_version import SINCE_SEEDS, find_vllm_minor

from dpgen.output.verification import verify

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FLAGS = (
    *("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "64000000", "--no-enable-chunked-prefill"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
    # On the CPU, vLLM gives rows without an adapter that of the last slot: it must stay empty.
    *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
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
    "too long": {"messages": [{"role": "user", "content": "hello " * 800}]},
    "bad temperature": {"temperature": -1},
    "too many tokens": {"max_tokens": 5000},
    "no messages": {"messages": []},
    "an adapter": {"model": "math"},
    "samples of an adapter": {"model": "math", "n": 2, "temperature": 1.0, "seed": 3},
    "an open thought": {"chat_template_kwargs": {}},
    "no effort": {"chat_template_kwargs": {}, "reasoning_effort": "none"},
    "a bad schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frob"}}}
    },
}

# Of texts that tests/helpers/tiny_pooling.py knows the words of.
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "a text": {"input": "the quick brown fox"},
    "texts": {"input": ["the fox", "hello world where is it", "the fox"]},
    "token ids": {"input": [2, 60, 61, 3]},
    "lists of token ids": {"input": [[60], [61, 62]]},
    "base64": {"input": ["the fox", "it sleeps"], "encoding_format": "base64"},
    "dimensions": {"input": "the fox", "dimensions": 16},
    "dimensions as base64": {"input": "the fox", "dimensions": 16, "encoding_format": "base64"},
    "too many dimensions": {"dimensions": 4096},
    "no dimensions": {"dimensions": 0},
    "too long": {"input": "the " * 100},
    "one is too long": {"input": ["the fox", "the " * 100]},
    "no texts": {"input": []},
    "an empty text": {"input": ""},
    "an empty text among others": {"input": ["", "the fox"]},
    "out of vocabulary": {"input": [99_999]},
    "a stream": {"encoding_format": "bytes"},
    "no model": {"model": None},
    "an unknown model": {"model": "nope"},
    "a field that nobody knows": {"frobnicate": 1, "user": "me"},
    "not scaled": {"use_activation": False},
    "no special tokens": {"add_special_tokens": False},
    "cut": {"input": "the quick brown fox", "truncate_prompt_tokens": 3},
    "half precision as base64": {"embed_dtype": "float16", "encoding_format": "base64"},
}

# Before, choices of several lines were for another grammar backend than the rest, and an engine has only one: that of
# its first constrained request.
SINCE_LINES = "0.31"

# Which dpgen does not support yet: see "Response files" in conf/README.md.
UNSUPPORTED = ("no special tokens", "cut", "half precision as base64")

CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
THINKING: dict[str, Any] = {"temperature": 1.0, "seed": 3, "chat_template_kwargs": {}, "max_tokens": 40}


def make_writing_bodies(tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Return requests that bring a random model to write thoughts and calls: most of its tokens are forbidden.

    Args:
        tokenizer: whose tokens are letters, and the marks of thoughts.
    """
    end, eos = tokenizer.convert_tokens_to_ids("</think>"), tokenizer.eos_token_id
    letters = {text: tokenizer(text)["input_ids"] for text in ("ab ", "yesno", CALL, "t")}
    blanks = [number for number in range(len(tokenizer)) if any(map(str.isspace, tokenizer.decode([number])))]
    no_blanks = dict.fromkeys(map(str, blanks), -100)

    def think(text: str, **fields: Any) -> dict[str, Any]:
        allowed = [*letters[text], end, eos]
        return {**THINKING, "allowed_token_ids": allowed, "logit_bias": {str(eos): -100, str(end): 1}, **fields}

    choice, call = {"choice": ["yes", "no"]}, {"structured_outputs": {"choice": [CALL]}, "tools": [TOOL]}
    literal = {"logit_bias": {**no_blanks, str(letters["t"][0]): 100}, "tools": [TOOL], "max_tokens": 150}
    named = {"type": "function", "function": {"name": "look"}}
    return {
        "a thought": think("ab "),
        "thoughts of two samples": think("ab ", n=2, seed=5),
        "a hidden thought": think("ab ", include_reasoning=False, logprobs=True, return_token_ids=True),
        "a thought with its tokens": think("ab ", return_token_ids=True, logprobs=True, top_logprobs=1),
        "a choice after a thought": think("yesno", structured_outputs=choice),
        "a choice without its thought": think("yesno", structured_outputs=choice, include_reasoning=False),
        "a choice that never begins": think("yesno", structured_outputs=choice, logit_bias={str(end): -100}),
        "a call": {**call, "max_tokens": 150},
        "a call after a thought": think(CALL, seed=8, max_tokens=150, **call),
        "two calls": {**call, "max_tokens": 200, "structured_outputs": {"choice": [f"a {CALL}\n{CALL}"]}},
        "one call of two": {
            **call,
            "max_tokens": 200,
            "structured_outputs": {"choice": [f"{CALL}\n{CALL}"]},
            "parallel_tool_calls": False,
        },
        "a call that is cut off": {**call, "max_tokens": 20},
        "a call that is no JSON": {**call, "structured_outputs": {"choice": ["<tool_call>{oops}</tool_call>"]}},
        "a call that nobody wants": {**call, "tool_choice": "none", "max_tokens": 150},
        "a call without tools": {"structured_outputs": {"choice": [CALL]}, "max_tokens": 150},
        "a required call that ends": {**literal, "tool_choice": "required"},
        "a named call that ends": {**literal, "tool_choice": named},
    }


def make_lines(bodies: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line for each body, without thoughts unless the body says otherwise."""
    common = {"model": "tiny", "temperature": 0, "chat_template_kwargs": {"enable_thinking": False}}
    return [make_chat(name, **{**common, **body}) for name, body in bodies.items()]


def is_sound_in(version: str, body: dict[str, Any]) -> bool:
    """Return True unless an older vLLM answers a request otherwise each time, whatever sends it."""
    is_sampled = body.get("temperature", 0) > 0
    has_lines = r"\n" in json.dumps(body.get("structured_outputs"))
    return (version >= SINCE_SEEDS or not is_sampled) and (version >= SINCE_LINES or not has_lines)


def drop_own(body: dict[str, Any]) -> dict[str, Any]:
    """Return a response body without what is its own, the random ids of calls included."""
    kept = {key: value for key, value in body.items() if key not in OWN_FIELDS}
    kept["usage"] = {**kept["usage"], "completion_tokens_details": None}
    for choice in kept["choices"]:
        for call in choice["message"].get("tool_calls", ()):
            call["id"] = "call"
    return kept


def check_writing(found: dict[str, list[dict[str, Any]]]) -> None:
    """Check that the requests have brought the model to write what they are there for.

    Args:
        found: the choices of each response, by custom_id.
    """
    messages = {name: choices[0]["message"] for name, choices in found.items()}
    for name in ("a call", "a call after a thought", "two calls", "one call of two", "a required call that ends"):
        assert messages[name]["tool_calls"] and found[name][0]["finish_reason"] == "tool_calls", name
    assert len(messages["two calls"]["tool_calls"]) == 2 and len(messages["one call of two"]["tool_calls"]) == 1
    assert messages["a named call that ends"]["tool_calls"]
    for name in ("a thought", "a choice after a thought", "a call after a thought"):
        assert messages[name]["reasoning"], name
    assert messages["a choice after a thought"]["content"] in ("yes", "no")
    assert messages["a choice without its thought"]["reasoning"] is None
    assert messages["an adapter"]["content"] != messages["plain"]["content"]


def is_near(one: Any, other: Any, tolerance: float = 1e-4) -> bool:
    """Return True if two values are the same, but for the last digits of numbers."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(is_near(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(is_near(*items, tolerance) for items in zip(one, other, strict=True))
    return bool(one == other)


def test_responses_are_those_of_vllm_run_batch(launcher: Launcher, tmp_path: Path) -> None:
    from transformers import AutoTokenizer  # takes seconds, and every worker imports this module

    model = save_tiny_model(tmp_path / "model", "plain", max_model_len=512)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(model)
    bodies = {**BODIES, **make_writing_bodies(tokenizer)}
    version = find_vllm_minor()
    lines = make_lines({name: body for name, body in bodies.items() if is_sound_in(version, body)})
    source = write_batch(tmp_path / "in.jsonl", lines)
    adapter = save_adapter(tmp_path / "math")
    command = ("-i", str(source), "--model", str(model), *FLAGS, "--lora-modules", f"math={adapter}")
    program = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    peer = launcher.start([*program, *command, "-o", str(tmp_path / "vllm.jsonl")], VLLM_NO_USAGE_STATS="1")
    assert peer.wait() == 0, peer.output
    # vLLM has no completions in batch files. This one has the prompt of "plain".
    messages = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    completion = make_completion("completion", prompt, model="tiny", temperature=0, echo=True)
    write_batch(source, [*lines, completion])
    recipe = ("conf/batch.yaml", "run.dir=" + str(tmp_path / "dpgen.jsonl.run"))
    job = launcher.dpgen("run-batch", *command, "-o", str(tmp_path / "dpgen.jsonl"), *recipe)
    assert job.wait() == 0, job.output
    expected = [json.loads(line) for line in (tmp_path / "vllm.jsonl").read_text().splitlines()]
    *responses, last = read_responses(tmp_path / "dpgen.jsonl")
    different, found = {}, {}
    for theirs, ours in zip(expected, responses, strict=True):
        assert list(ours) == list(theirs) and list(ours["response"]) == list(theirs["response"])
        assert ours["custom_id"] == theirs["custom_id"]
        bodies = [response["response"]["body"] for response in (theirs, ours)]
        if theirs["response"]["status_code"] == 200 and bodies[1] is not None:
            assert all(bodies)
            found[ours["custom_id"]] = bodies[1]["choices"]
            if not is_near(*map(drop_own, bodies)):
                different[ours["custom_id"]] = bodies
        elif theirs["response"]["status_code"] != ours["response"]["status_code"]:
            different[ours["custom_id"]] = [theirs["error"], ours["error"]]
        else:
            assert {*theirs["error"]["error"], "error_type"} == set(ours["error"]["error"])
            assert theirs["error"]["error"]["type"] == ours["error"]["error"]["type"]
    assert not different
    if version >= "0.32":  # the seeds were chosen with its sampler for the CPU
        check_writing(found)
    [choice], [plain] = last["response"]["body"]["choices"], found["plain"]
    assert (choice["text"], choice["finish_reason"]) == (prompt + plain["message"]["content"], plain["finish_reason"])
    assert verify(tmp_path / "dpgen.jsonl.run").verdict == "sound"


def test_embeddings_are_those_of_vllm_run_batch(launcher: Launcher, tmp_path: Path) -> None:
    model = save_tiny_pooling("bert", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "is_matryoshka": True}))
    lines = [make_embeddings(name, **{"model": "tiny", **body}) for name, body in EMBEDDINGS.items()]
    source = write_batch(tmp_path / "in.jsonl", lines)
    flags = ("--served-model-name", "tiny", "--dtype", "float32", "--max-num-seqs", "16", "--enforce-eager")
    command = ("-i", str(source), "--model", str(model), *flags, "--kv-cache-memory-bytes", "64000000")
    program = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    peer = launcher.start([*program, *command, "-o", str(tmp_path / "vllm.jsonl")], VLLM_NO_USAGE_STATS="1")
    assert peer.wait() == 0, peer.output
    out = tmp_path / "dpgen.jsonl"
    job = launcher.dpgen("run-batch", *command, "-o", str(out), "task=embed")
    assert job.wait() == 0, job.output
    expected = [json.loads(line) for line in (tmp_path / "vllm.jsonl").read_text().splitlines()]
    for theirs, ours in zip(expected, read_responses(out), strict=True):
        name, bodies = theirs["custom_id"], [response["response"]["body"] for response in (theirs, ours)]
        if name in UNSUPPORTED:
            assert ours["error"]["error"]["error_type"] == "unsupported_request", name
            continue
        assert ours["response"]["status_code"] == theirs["response"]["status_code"], (name, theirs, ours)
        assert (bodies[0] is None) == (bodies[1] is None), name
        if bodies[0] is None:
            assert (name == "a stream") or theirs["error"]["error"]["type"] == ours["error"]["error"]["type"]
            continue
        kept = [{key: value for key, value in body.items() if key not in ("id", "created")} for body in bodies]
        for body in kept:
            body["usage"] = {**body["usage"], "completion_tokens_details": None}
        for body in kept:
            assert {type(item["embedding"]) for item in body["data"]} == {str if "base64" in name else list}, name
        assert is_near(*map(decode_embeddings, kept), tolerance=1e-5), name
    assert verify(tmp_path / "dpgen.jsonl.run").verdict == "sound"
