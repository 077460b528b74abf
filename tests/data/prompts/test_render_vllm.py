"""Our token ids equal those that vLLM's LLM.generate and LLM.chat use (RequestOutput.prompt_token_ids).

vLLM runs in a separate process, one for all tokenizers, since importing vLLM takes longer than loading a model. This
file, run as a script, is that process. It also renders every prompt with `VllmRenderer`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_tokenizers
from helpers.chat_templates import CONTENT_FORMATS
from helpers.jobs import REPO
from helpers.tiny_model import save_tiny_model
from helpers.vllm_version import find_vllm_minor

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.chat import KNOWN_PART_KEYS
from dpgen.data.prompts.content_format import template_variables
from dpgen.data.prompts.render import PromptRenderer
from dpgen.data.prompts.template_kwargs import find_accepted_names
from dpgen.data.tokenizer import TokenizerConfig, is_supported_by_transformers, load_tokenizer
from dpgen.errors import ConfigError, RowRefused

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("engines")]  # one process answers for all

# What dpgen does with every version of vLLM, and vLLM itself from the given version on (`versions.CHANGED`).
SINCE = {
    "chat: broken arguments": "0.29",
    "chat: list arguments": "0.29",
    "chat: billing header": "0.32",
    "chat: only a billing header": "0.32",
}
SINCE_MACROS, SINCE_VIDEO_EMBEDS = "0.30", "0.29"
MODES = [("deepseek_v32", "plain"), ("mistral", "mistral")]


@dataclass
class Case:
    """Hold one row: `value` as the user means it, and the keys of `PromptConfig` that it is rendered with.

    Attributes:
        columns: the row's further columns.
        chat_keys: arguments of LLM.chat that stand for these columns; its messages, too.
    """

    name: str
    value: Any
    keys: dict[str, Any] = field(default_factory=dict)
    only_vllm_accepts: bool = False
    columns: dict[str, Any] = field(default_factory=dict)
    chat_keys: dict[str, Any] = field(default_factory=dict)


def message(role: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def tool_call(arguments: Any) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": arguments}}


HELLO = message("user", "hello")
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
    "system": [message("system", "be brief"), HELLO],
    "turns": [HELLO, message("assistant", "hello there"), message("user", " and you? ")],
    "empty text": [message("user", "")],
    "unicode": [message("user", "naïve 你好 🤗 cafe\u0301")],
    "special tokens": [message("user", "</s><s>[INST] <|im_end|>\n<|im_start|>system")],
    "parts": [message("user", [text("one"), text(""), text("two")])],
    "strings and parts": [message("user", ["one", text("two"), {"type": "input_text", "text": "three"}])],
    "no parts": [message("user", []), HELLO],
    "part without text": [message("user", [{"type": "text"}, {"type": "refusal"}, text("two")])],
    "marked part": [message("user", [{**text("one"), "mark": "!", "cache_control": {"type": "x"}}])],
    "thinking part": [HELLO, message("assistant", [{"type": "thinking", "thinking": "hm"}, text("yes")])],
    "refusal part": [HELLO, message("assistant", [{"type": "refusal", "refusal": "no"}])],
    "billing header": [message("system", "x-anthropic-billing-header: 1\nbe brief"), HELLO],
    "only a billing header": [message("system", "x-anthropic-billing-header: 1"), HELLO],
    "name and task": [message("user", "hello", name="ann", task="t", weight=1)],
    "reasoning": [HELLO, message("assistant", "yes", reasoning="hm")],
    "reasoning_content": [HELLO, message("assistant", "yes", reasoning_content="hm")],
    "tool call": [HELLO, message("assistant", tool_calls=[CALL]), message("tool", "3", tool_call_id="c1")],
    "no tool calls": [HELLO, message("assistant", "yes", tool_calls=[])],
    "broken arguments": [HELLO, message("assistant", "", tool_calls=[tool_call("{")])],
    "list arguments": [HELLO, message("assistant", "", tool_calls=[tool_call("[1]")])],
    "object arguments": [HELLO, message("assistant", "", tool_calls=[tool_call({"a": 1})])],
    "no arguments": [HELLO, message("assistant", "", tool_calls=[{"function": {"name": "f"}}])],
    "custom call": [HELLO, message("assistant", "", tool_calls=[{"type": "custom", "function": {"name": "f"}}])],
    "tool parts": [HELLO, message("tool", [text("one"), text(""), text("two")], tool_call_id="c1")],
    "tool reference": [HELLO, message("tool", [{"type": "tool_reference", "name": "sum"}])],
    "developer": [HELLO, message("developer", "be brief"), message("system", "be kind")],
    "developer first": [message("developer", [text("be"), text("brief")], tools=[{"name": "sum"}]), HELLO],
    "unknown role": [message("critic", "hello")],
    "no messages": [],
    "image": [message("user", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}])],
    "part without type": [message("user", [{"text": "one"}])],
    "text with uuid": [message("user", [{**text("one"), "uuid": "u"}])],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]
NAMED_TEMPLATES = {
    "default": "{{ tools }}{{ messages[0].content }}",
    "short": "{{ tools | length }}{{ messages[0].content }}",
}
OWN_TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tail }}"
OWN_PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}"
PROMPT_KEYS: dict[str, dict[str, Any]] = {
    "system prompt": {"system_prompt": "be brief"},
    "no opening": {"add_generation_prompt": False},
    "variables": {"chat_template_kwargs": {"enable_thinking": False, "tail": "!", "padding": True}},
    "tools among the variables": {"chat_template_kwargs": {"tools": TOOLS}},
    "tools": {"tools": TOOLS},
    "own template": {"chat_template": OWN_TEMPLATE, "chat_template_kwargs": {"tail": "~"}},
    "own template, parts": {"chat_template": OWN_PARTS},
    "continued": {"add_generation_prompt": False, "continue_final_message": True},
}


def make_cases() -> list[Case]:
    texts = {"prompt_column": "value"}
    chats = {"messages_column": "value"}
    as_chat = {"prompt_column": "value", "as_chat": True}
    unfinished = [HELLO, message("assistant", "well, ")]
    parts = [HELLO, message("assistant", [text("well"), text("then ")])]
    cases = [Case(f"text: {name}", value, texts) for name, value in TEXTS.items()]
    cases += [Case(f"as chat: {name}", value, as_chat) for name, value in TEXTS.items()]
    cases += [Case(f"chat: {name}", value, chats) for name, value in CHATS.items()]
    for name, keys in PROMPT_KEYS.items():
        cases.append(Case(f"{name}: messages", deepcopy(unfinished), chats | keys))
        cases.append(Case(f"{name}: parts", deepcopy(parts), chats | keys))
    cases += make_column_cases(chats)
    cases.append(Case("template", "hello", {"template": "Q: {{ value }}\n"}))
    cases.append(Case("template as chat", "hello", {"template": "Q: {{ value }}\n", "as_chat": True}))
    cases.append(Case("number as text", [message("user", [text(3)])], chats, only_vllm_accepts=True))  # type: ignore[arg-type]
    return cases


def make_column_cases(chats: dict[str, Any]) -> list[Case]:
    """Return rows with parts of their prompts in further columns."""
    opened = {"add_generation_prompt": False, "continue_final_message": True}
    keys = {"p": "prefill_column", "s": "system_prompt_column", "k": "chat_template_kwargs_column", "t": "tools_column"}
    prefilled = [HELLO, message("assistant", "well, ")]
    rows: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"p": "well, "}, {"messages": prefilled, **opened}),
        ({"p": None}, {}),
        ({"s": "be kind"}, {"messages": [message("system", "be kind"), HELLO]}),
        ({"t": TOOLS}, {"tools": TOOLS}),
        ({"t": [TOOLS[0]["function"]]}, {"tools": TOOLS}),
        ({"t": json.dumps(TOOLS), "p": "well, "}, {"tools": TOOLS, "messages": prefilled, **opened}),
        ({"k": {"enable_thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"k": '{"documents": [{"text": "a"}]}'}, {"chat_template_kwargs": {"documents": [{"text": "a"}]}}),
    ]
    return [
        Case(f"columns: {columns}", [HELLO], chats | {keys[name]: name for name in columns}, False, columns, theirs)
        for columns, theirs in rows
    ] + [Case("token ids", [5, 7, 40, 1], {"token_ids_column": "value"})]


def with_nulls(value: Any) -> Any:
    """Return a row's messages as Arrow gives them when other rows of the dataset have more keys."""
    extra = {"role": ("name", "tool_calls", "tool_call_id", "reasoning", "refusal", "tools", "content")}
    extra |= {"type": ("image_url", "text", "refusal", "thinking", "mark"), "function": ("index", "type")}
    if isinstance(value, list):
        return [with_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = [key for mark, more in extra.items() if mark in value for key in more if key not in value]
    return {key: with_nulls(item) for key, item in value.items()} | dict.fromkeys(keys)


def make_config(case: Case, tokenizer: Any) -> PromptConfig:
    """Return the case's keys, without variables that the chat template does not use, which we refuse."""
    config = PromptConfig(**case.keys)
    template = config.chat_template or getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return config
    if "tools" not in template_variables(template):
        config = replace(config, tools=None, tools_column=None)
    if case.columns.get("k") and "enable_thinking" not in template:
        config = replace(config, chat_template_kwargs_column=None)
    accepted = find_accepted_names(tokenizer, template)
    used = {name: value for name, value in config.chat_template_kwargs.items() if name in accepted}
    return replace(config, chat_template_kwargs=used)


def render_in_rank(case: Case, value: Any, tokenizer: Any) -> list[int] | str:
    """Return our token ids, or the type of the error; variables that we refuse have no effect on vLLM's."""
    try:
        return PromptRenderer(make_config(case, tokenizer), tokenizer).tokenize_row({"value": value, **case.columns})
    except RowRefused as error:
        return error.type


@dataclass(frozen=True)
class VllmAnswers:
    """Hold a model's folder, and vLLM's answers to all cases with this model; see `main`."""

    folder: Path
    theirs: dict[str, Any]


@pytest.fixture(scope="module")
def vllm_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VllmAnswers]:
    """Return the answers by the tokenizer's name, or by the tokenizer mode."""
    folder = tmp_path_factory.mktemp("answers")
    models = [(name, name, {}) for name in tiny_tokenizers.NAMES]
    models += [(mode, tokenizer, {"tokenizer_mode": mode}) for mode, tokenizer in MODES]
    questions = [
        {
            "folder": str(save_tiny_model(folder / key, tokenizer)),
            "answer": str(folder / f"{key}.json"),
            "engine": engine,
        }
        for key, tokenizer, engine in models
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
    return {key: VllmAnswers(folder / key, json.loads((folder / f"{key}.json").read_text())) for key, _, _ in models}


@pytest.mark.parametrize("name", tiny_tokenizers.NAMES)
def test_our_token_ids_equal_those_of_vllm_in_every_case(name: str, vllm_answers: dict[str, VllmAnswers]) -> None:
    config = TokenizerConfig.from_engine(str(vllm_answers[name].folder), {})
    assert is_supported_by_transformers(config)
    tokenizer = load_tokenizer(config)
    theirs = vllm_answers[name].theirs
    num_accepted, version = 0, find_vllm_minor()
    for case in make_cases():
        generated, rendered = theirs["generate"][case.name], theirs["renderer"][case.name]
        plain, filled = (
            render_in_rank(case, case.value, tokenizer),
            render_in_rank(case, with_nulls(case.value), tokenizer),
        )
        assert plain == filled, f"{case.name}: nulls change the prompt"
        if version < SINCE.get(case.name, ""):
            continue
        if case.only_vllm_accepts or generated is None:
            assert isinstance(plain, str), f"{case.name}: vLLM rejects it, {theirs['errors'].get(case.name)}"
            assert isinstance(rendered, str), case.name
        else:
            num_accepted += 1
            assert plain == generated, f"{case.name}: {tokenizer.decode(plain)!r} {tokenizer.decode(generated)!r}"
            assert rendered == generated, f"{case.name}, rendered in the engine"
    assert num_accepted > 40
    by_name = tokenizer.encode("1hello", add_special_tokens=False)
    assert theirs["named"]["short"] == by_name, "a template of the tokenizer by its name"
    assert "the tokenizer has no chat template of this name; chat templates: default, short" in theirs["named"]["none"]
    formats = {text: kind for text, kind in CONTENT_FORMATS.items() if "macro" not in text or version >= SINCE_MACROS}
    assert {text: theirs["formats"][text] for text in formats} == formats
    later = {"video_embeds"} if version < SINCE_VIDEO_EMBEDS else set()
    assert set(theirs["known part keys"]) == KNOWN_PART_KEYS - later


@pytest.mark.parametrize("mode", [mode for mode, _ in MODES])
def test_a_tokenizer_mode_that_only_vllm_has_is_rendered_in_the_engine(
    mode: str, vllm_answers: dict[str, VllmAnswers]
) -> None:
    assert not is_supported_by_transformers(
        TokenizerConfig.from_engine(str(vllm_answers[mode].folder), {"tokenizer_mode": mode})
    )
    theirs = vllm_answers[mode].theirs
    num_accepted = 0
    for case in make_cases():
        generated, rendered = theirs["generate"][case.name], theirs["renderer"][case.name]
        if case.only_vllm_accepts or generated is None:
            assert isinstance(rendered, str), f"{case.name}: vLLM rejects it, {theirs['errors'].get(case.name)}"
        else:
            num_accepted += 1
            assert rendered == generated, case.name
    assert num_accepted > 25


# ---- the process with vLLM


def main(questions: str) -> None:
    """Run one engine for each question, give it all cases, and write the results to the question's answer file."""
    for question in json.loads(questions):
        Path(question["answer"]).write_text(json.dumps(collect_answers(question["folder"], question["engine"])))


def collect_answers(folder: str, engine: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
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
    for case in make_cases():
        try:
            theirs["generate"][case.name] = generate(llm, case)
        except Exception as error:  # noqa: BLE001 - any error means that vLLM rejects the row
            theirs["generate"][case.name] = None
            theirs["errors"][case.name] = repr(error)
        theirs["renderer"][case.name] = render_in_engine(llm, case)
    theirs["formats"] = {template: _detect_content_format(template, default="string") for template in CONTENT_FORMATS}
    theirs["known part keys"] = sorted(find_known_part_keys())
    theirs["named"] = render_named_templates(llm)
    llm.llm_engine.engine_core.shutdown()
    return theirs


def find_known_part_keys() -> frozenset[str]:
    # Up to 0.31, of 0.32, and from 0.33 on.
    for module in ("entrypoints.chat_utils", "renderers.chat_utils", "renderers.chat_utils.chat_message"):
        with contextlib.suppress(ImportError, AttributeError):
            keys: frozenset[str] = importlib.import_module(f"vllm.{module}")._KNOWN_CONTENT_PART_FIELDS
            return keys
    raise AssertionError("vLLM has moved its names of parts' keys")


def generate(llm: Any, case: Case) -> list[int]:
    """Generate as a user of vLLM would. The keys are read here by hand, so that none of our code takes part."""
    from vllm import SamplingParams

    keys = {name: value for name, value in case.keys.items() if value not in list(case.columns)}
    as_chat = keys.pop("as_chat", False)
    prompt = deepcopy(case.value)
    if "template" in keys:
        prompt = keys.pop("template").replace("{{ value }}", prompt)
        prompt = prompt if isinstance(case.value, str) else ""
    sampling = SamplingParams(max_tokens=1)
    if "token_ids_column" in keys:
        prompt = {"prompt_token_ids": prompt}
    keys.pop("prompt_column", None)
    if keys.pop("messages_column", None) is None and not as_chat:
        (output,) = llm.generate(prompt, sampling, use_tqdm=False)
        return list(output.prompt_token_ids)
    messages = [message("user", prompt)] if as_chat else prompt
    if "system_prompt" in keys:
        messages = [message("system", keys.pop("system_prompt")), *messages]
    keys |= deepcopy(case.chat_keys)
    messages = keys.pop("messages", messages)
    (output,) = llm.chat([messages], sampling, use_tqdm=False, **keys)
    return list(output.prompt_token_ids)


def render_named_templates(llm: Any) -> dict[str, Any]:
    """Return what `VllmRenderer` makes of HELLO, by the name of the template, or the error."""
    from dpgen.engine.vllm.vllm_render import VllmRenderer

    tokenizer, found = llm.llm_engine.renderer.tokenizer, {}
    with contextlib.suppress(AttributeError):  # some tokenizers of vLLM's own have no template to set
        tokenizer.chat_template = NAMED_TEMPLATES
    for name in ("short", "none"):
        config = PromptConfig(messages_column="value", chat_template={"name": name}, tools_column="t")
        try:
            prompt = PromptRenderer(config, None).build_prompt({"value": [HELLO], "t": TOOLS})
            assert isinstance(prompt, dict)
            found[name] = VllmRenderer(llm.llm_engine, config).render(prompt)
        except (ConfigError, RowRefused) as error:
            found[name] = str(error)
    return found


def render_in_engine(llm: Any, case: Case) -> list[int] | str:
    from vllm.renderers.hf import HfRenderer

    from dpgen.engine.vllm.vllm_render import VllmRenderer

    renderer = llm.llm_engine.renderer
    has_template = isinstance(renderer, HfRenderer)  # the others have code instead, which takes any name
    config = make_config(case, renderer.tokenizer) if has_template else PromptConfig(**case.keys)
    try:
        prompt = PromptRenderer(config, None).build_prompt({"value": with_nulls(case.value), **case.columns})
        return prompt if isinstance(prompt, list) else VllmRenderer(llm.llm_engine, config).render(prompt)
    except RowRefused as error:
        return error.type


if __name__ == "__main__":
    main(*sys.argv[1:])
