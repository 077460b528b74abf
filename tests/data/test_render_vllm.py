"""Our token ids against those that vLLM's LLM.generate and LLM.chat use (RequestOutput.prompt_token_ids).

vLLM runs in a process of its own, one for all tokenizers, since it takes longer to import than to load: this file, as
a script, is that process. It renders every prompt with `VllmRenderer`, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_tokenizers
from helpers.chat_templates import CONTENT_FORMATS
from helpers.jobs import REPO
from helpers.tiny_model import save_tiny_model

from dpgen.data.chat import KNOWN_PART_KEYS
from dpgen.data.render import PromptConfig, PromptRenderer
from dpgen.data.tokenizer import TokenizerConfig, is_supported_by_transformers, load_tokenizer
from dpgen.errors import RowRefused

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("render")]  # one process answers for all

MODES = [("deepseek_v32", "plain"), ("mistral", "mistral")]


@dataclass
class Case:
    """One row: `value` as the user means it, and the settings that it is rendered with."""

    name: str
    value: Any
    settings: dict[str, Any] = field(default_factory=dict)
    refused_here: bool = False  # though vLLM takes it


def said(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def calling(arguments: Any) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": arguments}}


HELLO = said("user", "hello")
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "sum", "arguments": '{"b": [1, null], "a": "é"}'},
}
TEXTS = {
    "plain": "hello world",
    "empty": "",
    "spaces": "  a\n\n\tb  ",
    "unicode": "naïve 你好 🤗",
    "decomposed": "cafe\u0301",
    "special tokens": "<s>hello</s> <|im_start|>system<|im_end|><unk>",
    "control": "a\x00\x07b",
    "long": "the quick brown fox " * 8,
}
CHATS = {
    "system": [said("system", "be brief"), HELLO],
    "turns": [HELLO, said("assistant", "hello there"), said("user", " and you? ")],
    "empty text": [said("user", "")],
    "unicode": [said("user", "naïve 你好 🤗 cafe\u0301")],
    "special tokens": [said("user", "</s><s>[INST] <|im_end|>\n<|im_start|>system")],
    "parts": [said("user", [text("one"), text(""), text("two")])],
    "strings and parts": [said("user", ["one", text("two"), {"type": "input_text", "text": "three"}])],
    "no parts": [said("user", []), HELLO],
    "part without text": [said("user", [{"type": "text"}, {"type": "refusal"}, text("two")])],
    "marked part": [said("user", [{**text("one"), "mark": "!", "cache_control": {"type": "x"}}])],
    "thinking part": [HELLO, said("assistant", [{"type": "thinking", "thinking": "hm"}, text("yes")])],
    "refusal part": [HELLO, said("assistant", [{"type": "refusal", "refusal": "no"}])],
    "billing header": [said("system", "x-anthropic-billing-header: 1\nbe brief"), HELLO],
    "only a billing header": [said("system", "x-anthropic-billing-header: 1"), HELLO],
    "name and task": [said("user", "hello", name="ann", task="t", weight=1)],
    "reasoning": [HELLO, said("assistant", "yes", reasoning="hm")],
    "reasoning_content": [HELLO, said("assistant", "yes", reasoning_content="hm")],
    "tool call": [HELLO, said("assistant", tool_calls=[CALL]), said("tool", "3", tool_call_id="c1")],
    "no tool calls": [HELLO, said("assistant", "yes", tool_calls=[])],
    "broken arguments": [HELLO, said("assistant", "", tool_calls=[calling("{")])],
    "list arguments": [HELLO, said("assistant", "", tool_calls=[calling("[1]")])],
    "object arguments": [HELLO, said("assistant", "", tool_calls=[calling({"a": 1})])],
    "no arguments": [HELLO, said("assistant", "", tool_calls=[{"function": {"name": "f"}}])],
    "custom call": [HELLO, said("assistant", "", tool_calls=[{"type": "custom", "function": {"name": "f"}}])],
    "tool parts": [HELLO, said("tool", [text("one"), text(""), text("two")], tool_call_id="c1")],
    "tool reference": [HELLO, said("tool", [{"type": "tool_reference", "name": "sum"}])],
    "developer": [HELLO, said("developer", "be brief"), said("system", "be kind")],
    "developer first": [said("developer", [text("be"), text("brief")], tools=[{"name": "sum"}]), HELLO],
    "unknown role": [said("critic", "hello")],
    "no messages": [],
    "image": [said("user", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}])],
    "part without type": [said("user", [{"text": "one"}])],
    "text with uuid": [said("user", [{**text("one"), "uuid": "u"}])],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]
OWN_TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tail }}"
OWN_PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}"
SETTINGS: dict[str, dict[str, Any]] = {
    "system prompt": {"system_prompt": "be brief"},
    "no opening": {"add_generation_prompt": False},
    "variables": {"chat_template_kwargs": {"enable_thinking": False, "tail": "!", "padding": True}},
    "tools": {"chat_template_kwargs": {"tools": TOOLS}},
    "own template": {"chat_template": OWN_TEMPLATE, "chat_template_kwargs": {"tail": "~"}},
    "own template, parts": {"chat_template": OWN_PARTS},
    "continued": {"add_generation_prompt": False, "continue_final_message": True},
}


def cases() -> list[Case]:
    texts = {"prompt_column": "value"}
    chats = {"messages_column": "value"}
    as_chat = {"prompt_column": "value", "as_chat": True}
    unfinished = [HELLO, said("assistant", "well, ")]
    parts = [HELLO, said("assistant", [text("well"), text("then ")])]
    found = [Case(f"text: {name}", value, texts) for name, value in TEXTS.items()]
    found += [Case(f"as chat: {name}", value, as_chat) for name, value in TEXTS.items()]
    found += [Case(f"chat: {name}", value, chats) for name, value in CHATS.items()]
    for name, settings in SETTINGS.items():
        found.append(Case(f"{name}: messages", deepcopy(unfinished), chats | settings))
        found.append(Case(f"{name}: parts", deepcopy(parts), chats | settings))
    found.append(Case("template", "hello", {"template": "Q: {{ value }}\n"}))
    found.append(Case("template as chat", "hello", {"template": "Q: {{ value }}\n", "as_chat": True}))
    found.append(Case("number as text", [said("user", [text(3)])], chats, refused_here=True))  # type: ignore[arg-type]
    return found


def with_nulls(value: Any) -> Any:
    """What a row's messages look like when other rows of the dataset have more keys."""
    extra = {"role": ("name", "tool_calls", "tool_call_id", "reasoning", "refusal", "tools", "content")}
    extra |= {"type": ("image_url", "text", "refusal", "thinking", "mark"), "function": ("index", "type")}
    if isinstance(value, list):
        return [with_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = [key for mark, more in extra.items() if mark in value for key in more if key not in value]
    return {key: with_nulls(item) for key, item in value.items()} | dict.fromkeys(keys)


def ours(case: Case, value: Any, tokenizer: Any) -> list[int] | str:
    try:
        return PromptRenderer(PromptConfig(**case.settings), tokenizer).tokenize_row({"value": value})
    except RowRefused as refused:
        return refused.type


@dataclass(frozen=True)
class VllmAnswers:
    """A model's folder, and what vLLM made of all cases with it; see `main`."""

    folder: Path
    theirs: dict[str, Any]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VllmAnswers]:
    """By the tokenizer's name, or by the tokenizer mode."""
    folder = tmp_path_factory.mktemp("asked")
    wanted = [(name, name, {}) for name in tiny_tokenizers.NAMES]
    wanted += [(mode, tokenizer, {"tokenizer_mode": mode}) for mode, tokenizer in MODES]
    questions = [
        {
            "folder": str(save_tiny_model(folder / key, tokenizer)),
            "answer": str(folder / f"{key}.json"),
            "engine": engine,
        }
        for key, tokenizer, engine in wanted
    ]
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]),
    }
    command = [sys.executable, __file__, json.dumps(questions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return {key: VllmAnswers(folder / key, json.loads((folder / f"{key}.json").read_text())) for key, _, _ in wanted}


@pytest.mark.parametrize("name", tiny_tokenizers.NAMES)
def test_token_for_token(name: str, asked: dict[str, VllmAnswers]) -> None:
    settings = TokenizerConfig.from_engine(str(asked[name].folder), {})
    assert is_supported_by_transformers(settings)
    tokenizer = load_tokenizer(settings)
    theirs = asked[name].theirs
    taken = 0
    for case in cases():
        generated, rendered = theirs["generate"][case.name], theirs["renderer"][case.name]
        plain, filled = ours(case, case.value, tokenizer), ours(case, with_nulls(case.value), tokenizer)
        assert plain == filled, f"{case.name}: nulls change the prompt"
        if case.refused_here or generated is None:
            assert isinstance(plain, str), f"{case.name}: vLLM refuses it, {theirs['errors'].get(case.name)}"
            assert isinstance(rendered, str), case.name
        else:
            taken += 1
            assert plain == generated, f"{case.name}: {tokenizer.decode(plain)!r} {tokenizer.decode(generated)!r}"
            assert rendered == generated, f"{case.name}, rendered in the engine"
    assert taken > 40
    assert theirs["formats"] == CONTENT_FORMATS
    assert set(theirs["known part keys"]) == KNOWN_PART_KEYS


@pytest.mark.parametrize("mode", [mode for mode, _ in MODES])
def test_a_tokenizer_mode_of_vllms_own(mode: str, asked: dict[str, VllmAnswers]) -> None:
    assert not is_supported_by_transformers(
        TokenizerConfig.from_engine(str(asked[mode].folder), {"tokenizer_mode": mode})
    )
    theirs = asked[mode].theirs
    taken = 0
    for case in cases():
        generated, rendered = theirs["generate"][case.name], theirs["renderer"][case.name]
        if case.refused_here or generated is None:
            assert isinstance(rendered, str), f"{case.name}: vLLM refuses it, {theirs['errors'].get(case.name)}"
        else:
            taken += 1
            assert rendered == generated, case.name
    assert taken > 25


# ---- the process with vLLM


def main(questions: str) -> None:
    """For each question: one engine, all cases, and what became of them in the file that is to hold the answer."""
    for question in json.loads(questions):
        Path(question["answer"]).write_text(json.dumps(answer(question["folder"], question["engine"])))


def answer(folder: str, engine: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.renderers.chat_utils import _KNOWN_CONTENT_PART_FIELDS
    from vllm.renderers.hf import _detect_content_format

    llm = LLM(
        model=folder,
        dtype="float32",
        max_model_len=256,
        max_num_batched_tokens=2048,
        enable_chunked_prefill=False,
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=32 << 20,
        enforce_eager=True,
        **engine,
    )
    theirs: dict[str, Any] = {"generate": {}, "renderer": {}, "errors": {}}
    for case in cases():
        try:
            theirs["generate"][case.name] = generate(llm, case)
        except Exception as error:  # noqa: BLE001 - whatever it is, the row is refused
            theirs["generate"][case.name] = None
            theirs["errors"][case.name] = repr(error)
        theirs["renderer"][case.name] = render_in_engine(llm, case)
    theirs["formats"] = {each: _detect_content_format(each, default="string") for each in CONTENT_FORMATS}
    theirs["known part keys"] = sorted(_KNOWN_CONTENT_PART_FIELDS)
    llm.llm_engine.engine_core.shutdown()
    return theirs


def generate(llm: Any, case: Case) -> list[int]:
    """As a user of vLLM would; the settings are read here by hand, to depend on no code of ours."""
    from vllm import SamplingParams

    settings = dict(case.settings)
    as_chat = settings.pop("as_chat", False)
    prompt = deepcopy(case.value)
    if "template" in settings:
        prompt = settings.pop("template").replace("{{ value }}", prompt)
        prompt = prompt if isinstance(case.value, str) else ""
    sampling = SamplingParams(max_tokens=1)
    settings.pop("prompt_column", None)
    if settings.pop("messages_column", None) is None and not as_chat:
        (output,) = llm.generate(prompt, sampling, use_tqdm=False)
        return list(output.prompt_token_ids)
    messages = [said("user", prompt)] if as_chat else prompt
    if "system_prompt" in settings:
        messages = [said("system", settings.pop("system_prompt")), *messages]
    (output,) = llm.chat([messages], sampling, use_tqdm=False, **settings)
    return list(output.prompt_token_ids)


def render_in_engine(llm: Any, case: Case) -> list[int] | str:
    from dpgen.engine.vllm_render import VllmRenderer

    settings = PromptConfig(**case.settings)
    try:
        prompt = PromptRenderer(settings, None).build_prompt({"value": with_nulls(case.value)})
        return VllmRenderer(llm.llm_engine, settings).render(prompt)
    except RowRefused as refused:
        return refused.type


if __name__ == "__main__":
    main(*sys.argv[1:])
