"""The recipe conf/prompt_columns.yaml on real vLLM: what it makes of a row's columns, and of bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_input import BAD_PROMPT_COLUMNS
from helpers.jobs import REPO, Launcher, load_result
from helpers.tiny_model import ENGINE, save_tiny_model

from dpgen.data.tokenizer import TokenizerConfig, load_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.multi]

COLUMNS = dict.fromkeys(["my example", "system", "tools", "prefill", "chat", "stop"])
SEARCH = json.loads((REPO / "conf" / "prompts" / "tools.json").read_text())
USER = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
BRIEF = "<|im_start|>system\nAnswer in one line.<|im_end|>\n"


def write_tools(*tools: dict[str, Any]) -> str:
    """Return what the tiny tokenizer's chat template makes of tools."""
    lines = "\n".join(json.dumps({"type": "function", "function": tool}) for tool in tools)
    return f"<|im_start|>tools\n{lines}\n<|im_end|>\n"


TEXT = "abcdefgh"  # a grammar lets the model write nothing else

# (the row's columns, its prompt, its text)
GOOD: list[tuple[dict[str, Any], str, str]] = [
    ({}, write_tools(*SEARCH) + BRIEF + USER, TEXT),
    ({"tools": []}, BRIEF + USER, TEXT),
    (
        {"tools": [{"name": "f"}], "system": "be kind"},
        f"{write_tools({'name': 'f'})}<|im_start|>system\nbe kind<|im_end|>\n{USER}",
        TEXT,
    ),
    ({"tools": '{"name": "f"}'}, write_tools({"name": "f"}) + BRIEF + USER, TEXT),
    ({"tools": [], "prefill": "Sure, "}, f"{BRIEF}{USER}Sure, ", TEXT),
    ({"tools": [], "prefill": ""}, BRIEF + USER, TEXT),
    ({"tools": [], "chat": {"enable_thinking": False}}, f"{BRIEF}{USER}<think></think>", TEXT),
    ({"tools": [], "chat": '{"enable_thinking": false}'}, f"{BRIEF}{USER}<think></think>", TEXT),
    ({"tools": [], "my example": "hi"}, BRIEF + USER.replace("hello", "hello\n\nFor example: hi"), TEXT),
    ({"tools": [], "stop": "e"}, BRIEF + USER, "abcd"),
    ({"tools": [], "stop": ["z", "fg"]}, BRIEF + USER, "abcde"),
    ({"tools": [], "stop": []}, BRIEF + USER, TEXT),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "plain", 512)


def test_the_parts_of_each_rows_prompt_come_from_its_columns(
    launcher: Launcher, write_config: Callable[..., str], tmp_path: Path, model: Path
) -> None:
    rows = [{"task": "hello", **COLUMNS, **columns} for columns, _, _ in GOOD]
    rows += [{"task": "hello", **COLUMNS, **columns} for _, columns, _, _ in BAD_PROMPT_COLUMNS]
    conf = write_config(
        rows,
        run={"engine": "vllm", "log_level": "error", "max_leading_errors": 0},
        data={"prompt_column": None},
        model=str(model),
        engine={**ENGINE, "max_model_len": 512},
        sampling={"temperature": 0, "max_tokens": 32, "structured_outputs": {"regex": TEXT}},
    )
    job = launcher.dpgen("run", "conf/prompt_columns.yaml", conf)
    assert job.wait() == 0, job.output
    result = load_result(tmp_path / "run")
    tokenizer = load_tokenizer(TokenizerConfig(str(model)))
    for row, (columns, prompt, text) in zip(result[: len(GOOD)], GOOD, strict=True):
        num_tokens = len(tokenizer.encode(prompt, add_special_tokens=False))
        assert (row["error"], row["num_prompt_tokens"], row["generated_text"]) == (None, num_tokens, text), columns
    for row, (what, _, error_type, words) in zip(result[len(GOOD) :], BAD_PROMPT_COLUMNS, strict=True):
        error = row["error"] or {"type": "none, but a text", "message": row["generated_text"]}
        assert error["type"] == error_type and words in error["message"], f"{what}: {error}"
