"""Rows become prompts, and prompts token ids, without vLLM; test_render_vllm.py compares with vLLM."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers import tiny_tokenizers
from helpers.chat_templates import CONTENT_FORMATS

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.chat import merge_developer_role, to_conversation, validate_messages
from dpgen.data.prompts.chat_template import check_chat_without_tokenizer, load_chat_template
from dpgen.data.prompts.columns import check_prompt_columns
from dpgen.data.prompts.content_format import detect_content_format
from dpgen.data.prompts.render import PromptRenderer, make_prompt_text_fn
from dpgen.data.tokenizer import (
    TokenizerConfig,
    find_reason_to_tokenize_in_engine,
    is_supported_by_transformers,
    load_tokenizer,
)
from dpgen.errors import ConfigError, RowRefused

COLUMNS = ["question", "context", "messages"]
HELLO = [{"role": "user", "content": "hello"}]
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "function": {"name": "sum", "arguments": '{"a": 1}'}}],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_tokenizers.save_tokenizer(name, tmp_path_factory.mktemp(name)) for name in tiny_tokenizers.NAMES}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load_tokenizer(TokenizerConfig(str(folder))) for name, folder in folders.items()}


# ---- PromptConfig


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {},
            "one of data.prompt_column, data.messages_column, data.template, data.token_ids_column; none is set",
        ),
        ({"prompt_column": "a", "template": "{{ a }}"}, "data.prompt_column and data.template are set"),
        ({"messages_column": "a", "as_chat": True}, "data.messages_column holds messages already"),
        ({"token_ids_column": "a", "as_chat": True}, "data.token_ids_column holds tokens already"),
        ({"token_ids_column": "a", "prompt_column": "b"}, "data.prompt_column and data.token_ids_column are set"),
        ({"token_ids_column": "a", "tools_column": "t"}, "data.tools_column needs a chat"),
        ({"prompt_column": "a", "prefill_column": "p"}, "data.prefill_column needs a chat"),
        ({"template": "{{ a }}", "system_prompt_column": "s"}, "data.system_prompt_column needs a chat"),
        ({"prompt_column": "a", "tools": [{"name": "f"}]}, "data.tools needs a chat"),
        ({"prompt_column": "a", "chat_template_kwargs_column": "k"}, "data.chat_template_kwargs_column needs a chat"),
        (
            {
                "messages_column": "a",
                "prefill_column": "p",
                "add_generation_prompt": False,
                "continue_final_message": True,
            },
            "leaves the last message open, and data.prefill_column adds another",
        ),
        (
            {"messages_column": "a", "tools": [{"name": "f"}], "chat_template_kwargs": {"tools": []}},
            "data.chat_template_kwargs.tools and data.tools are set",
        ),
        (
            {"messages_column": "a", "tools_column": "t", "chat_template_kwargs": {"tools": []}},
            "data.chat_template_kwargs.tools and data.tools_column are set",
        ),
        ({"messages_column": "a", "tools": [{"parameters": {}}]}, "data.tools: tool 0 has no 'name'"),
        ({"messages_column": "a", "chat_template": {"nam": "x"}}, "must be a text, a path, or {name: NAME}"),
        ({"messages_column": "a", "chat_template": ["x"]}, "must be a text, a path, or {name: NAME}"),
        ({"messages_column": "a", "chat_template": {"name": 1}}, "must be a text, a path, or {name: NAME}"),
        ({"messages_column": "a", "chat_template": ""}, "must be a text, a path, or {name: NAME}"),
        (
            {"prompt_column": "a", "system_prompt": "s"},
            "data.system_prompt needs a chat: set data.messages_column, or data.as_chat=true",
        ),
        ({"template": "{{ a }}", "chat_template": "s"}, "data.chat_template needs a chat"),
        ({"prompt_column": "a", "chat_template_kwargs": {"x": 1}}, "data.chat_template_kwargs needs a chat"),
        ({"messages_column": "a", "continue_final_message": True}, "needs data.add_generation_prompt=false"),
        ({"messages_column": "a", "chat_template_kwargs": {"tokenize": True}}, "may not hold tokenize"),
    ],
)
def test_keys_that_contradict_each_other_are_rejected(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        PromptConfig(**keys)
    assert "\n" not in str(raised.value), "one mistake is one line"


def test_all_contradictions_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        PromptConfig(prompt_column="a", template="{{ a }}", system_prompt="s", chat_template_kwargs={"tokenize": True})
    first, *others = raised.value.mistakes
    assert "data.prompt_column and data.template are set" in first
    assert [mistake.split()[0] for mistake in others] == ["data.system_prompt", *["data.chat_template_kwargs"] * 2]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"prompt_column": "qestion"},
            r"data.prompt_column: 'qestion' is no column.*did you mean 'question'\? columns: question, con",
        ),
        (
            {"messages_column": "zzz"},
            "data.messages_column: 'zzz' is no column of the dataset; columns: question, context, messages",
        ),
        ({"template": "{{ question }} {{ contxt }}"}, "data.template: 'contxt' is no column.*did you mean 'context'"),
        ({"template": "Q: {question}"}, r"data.template names no column; write {{ question }}, with two braces"),
        ({"template": "no column"}, r"names no column; write {{ question }}"),
        ({"template": "a\n{{ question"}, "data.template, line 2: "),
        ({"template": "{{ question | nonsense }}"}, "data.template, line 1: No filter named 'nonsense'"),
    ],
)
def test_a_missing_column_is_reported_with_the_nearest_one(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        check_prompt_columns(PromptConfig(**keys), COLUMNS)
    assert "\n" not in str(raised.value), "one mistake is one line"


@pytest.mark.parametrize("place", ["data.chat_template", "chat_template.jinja", "tokenizer_config.json"])
def test_without_a_tokenizer_a_chat_templates_variables_are_still_checked(tmp_path: Path, place: str) -> None:
    template, keys = "{% if enable_thinking %}{{ messages }}{% endif %}", {}
    if place == "data.chat_template":
        keys = {"chat_template": template}
    elif place == "chat_template.jinja":
        (tmp_path / place).write_text(template)
    else:
        (tmp_path / place).write_text(json.dumps({"chat_template": template}))
    for name in ("enable_thinking", "enable_thinkng"):
        config = PromptConfig(messages_column="messages", chat_template_kwargs={name: False}, **keys)
        if name == "enable_thinking":
            assert check_chat_without_tokenizer(config, str(tmp_path)) is None
            continue
        with pytest.raises(ConfigError, match="does not use 'enable_thinkng'; did you mean 'enable_thinking'"):
            check_chat_without_tokenizer(config, str(tmp_path))


def test_without_a_chat_template_it_is_said_that_its_variables_are_not_checked(tmp_path: Path) -> None:
    config = PromptConfig(messages_column="messages", chat_template_kwargs={"x": 1})
    assert check_chat_without_tokenizer(config, "some/model") == (
        "data.chat_template_kwargs is not checked without a chat template"
    )
    assert check_chat_without_tokenizer(PromptConfig(messages_column="messages"), str(tmp_path)) is None


def test_all_missing_columns_of_a_template_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_prompt_columns(PromptConfig(template="{{ qestion }} {{ contxt }} {{ question }}"), COLUMNS)
    assert len(raised.value.mistakes) == 2


@pytest.mark.parametrize(
    ("keys", "prompt"),
    [
        ({"prompt_column": "question"}, "Why?"),
        (
            {"messages_column": "messages"},
            {
                "messages": HELLO,
                "template_kwargs": {},
                "is_continued": False,
                "add_generation_prompt": True,
                "add_special_tokens": False,
            },
        ),
        ({"template": "{{ question }}{% for i in range(2) %}{{ i }}{{ loop.index }}{% endfor %}"}, "Why?0112"),
        ({"template": "{% set x = question %}{{ x }}"}, "Why?"),
    ],
)
def test_a_prompt_is_built_from_columns_that_exist(keys: dict[str, Any], prompt: Any) -> None:
    config = PromptConfig(**keys)
    check_prompt_columns(config, COLUMNS)
    assert PromptRenderer(config, None).build_prompt({"question": "Why?", "context": "", "messages": HELLO}) == prompt


def test_a_chat_template_is_a_file_or_a_text(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0].content }}é", encoding="utf-8")
    from_file = PromptConfig(messages_column="m", chat_template=str(path))
    assert load_chat_template(from_file) == "{{ messages[0].content }}é"
    as_text = PromptConfig(messages_column="m", chat_template="{{ messages[0].content }}é")
    assert load_chat_template(as_text) == load_chat_template(from_file)
    row = {"m": HELLO}
    assert PromptRenderer(as_text, tokenizers["bos"]).tokenize_row(row) == PromptRenderer(
        from_file, tokenizers["bos"]
    ).tokenize_row(row)
    with pytest.raises(ConfigError, match=r"data\.chat_template=.*none.jinja can't be read"):
        load_chat_template(PromptConfig(messages_column="m", chat_template=str(tmp_path / "none.jinja")))


def test_a_broken_or_missing_chat_template_is_reported_before_the_first_row(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.chat_template, line 2"):
        PromptRenderer(PromptConfig(messages_column="m", chat_template="\n{% if %}"), tokenizers["bos"])
    with pytest.raises(ConfigError, match=r"data\.chat_template, line 1: No filter named 'nonsense'"):
        PromptRenderer(PromptConfig(messages_column="m", chat_template="{{ messages | nonsense }}"), tokenizers["bos"])
    without = copy.deepcopy(tokenizers["bos"])
    without.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template; set data\.chat_template"):
        PromptRenderer(PromptConfig(messages_column="m"), without)
    PromptRenderer(PromptConfig(prompt_column="m"), without)


# ---- which tokenizer


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({}, TokenizerConfig("m", model="m")),
        ({"revision": "r"}, TokenizerConfig("m", "r", model="m", model_revision="r")),
        ({"tokenizer": "t", "revision": "r"}, TokenizerConfig("t", "r", model="m", model_revision="r")),
        (
            {"revision": "r", "tokenizer_revision": "s"},
            TokenizerConfig("m", "s", model="m", model_revision="r"),
        ),
        (
            {"trust_remote_code": True, "tokenizer_mode": "HF"},
            TokenizerConfig("m", trust_remote_code=True, tokenizer_mode="hf", model="m"),
        ),
        ({"max_model_len": 9, "hf_overrides": {"rope_theta": 1}}, TokenizerConfig("m", model="m")),
    ],
)
def test_tokenizer_options_default_as_in_vllm(engine: dict[str, Any], expected: TokenizerConfig) -> None:
    assert TokenizerConfig.from_engine("m", engine) == expected


@pytest.mark.parametrize(
    ("files", "engine", "words"),
    [
        ({}, {}, None),
        ({"config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}}, {}, None),
        ({}, {"tokenizer_mode": "mistral"}, "tokenizer_mode=mistral is vLLM's own"),
        ({}, {"tokenizer_mode": "slow"}, "tokenizer_mode=slow"),
        ({}, {"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({}, {"hf_overrides": {"architectures": ["X"]}}, "hf_overrides"),
        ({"tekken.json": {}}, {}, "Mistral tokenizer"),
        ({"original/tokenizer.model.v3": {}}, {}, "Mistral tokenizer"),
        ({"preprocessor_config.json": {}}, {}, "multi-modal processor"),
        ({"sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False}}, {}, None),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, {}, "do_lower_case"),
        ({}, {"hf_overrides": {"architectures": ["Qwen3ForSequenceClassification"]}}, None),
        ({"config.json": {"model_type": "gemma3"}}, {}, "gemma3 is multi-modal"),
        ({"config.json": {"model_type": "nobody_knows"}}, {}, "does not know the model type 'nobody_knows'"),
        (
            {"config.json": {"model_type": "deepseek_v3", "architectures": ["DeepseekV32ForCausalLM"]}},
            {},
            "a tokenizer mode of its own for DeepseekV32ForCausalLM",
        ),
        ({"config.json": {"model_type": "llama", "speculators_config": {}}}, {}, "speculator"),
    ],
)
def test_prompts_that_only_vllm_can_render_are_detected(
    tmp_path: Path, files: dict[str, Any], engine: dict[str, Any], words: str | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    config = TokenizerConfig.from_engine(str(tmp_path), engine)
    reason = find_reason_to_tokenize_in_engine(config)
    assert is_supported_by_transformers(config) == (words is None)
    assert reason is None if words is None else words in str(reason)


def test_a_broken_config_json_is_ignored_and_logged_for_debugging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text("{not json")
    with caplog.at_level("DEBUG", logger="dpgen"):
        assert is_supported_by_transformers(TokenizerConfig(str(tmp_path)))
    assert "config.json" in caplog.text, "an error is never dropped in silence"


def test_a_repository_that_cannot_be_reached_is_logged_for_debugging(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with caplog.at_level("DEBUG", logger="dpgen"):
        assert is_supported_by_transformers(TokenizerConfig("nobody/no-such-model"))
    assert "can't download the configuration of nobody/no-such-model: no route to the Hub" in caplog.text


def test_the_model_decides_the_mode_of_another_tokenizer(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "architectures": ["DeepseekV4ForCausalLM"]}')
    config = TokenizerConfig.from_engine(str(tmp_path), {"tokenizer": str(folders["bos"])})
    assert not is_supported_by_transformers(config)


@pytest.mark.parametrize("variable", ["VLLM_USE_MODELSCOPE", "VLLM_USE_FASTOKENS"])
def test_an_environment_variable_that_replaces_the_tokenizer_is_detected(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], variable: str
) -> None:
    config = TokenizerConfig(str(folders["bos"]))
    monkeypatch.setenv(variable, "0")
    assert is_supported_by_transformers(config)
    monkeypatch.setenv(variable, "1")
    assert variable in str(find_reason_to_tokenize_in_engine(config))


def test_a_tokenizer_that_cannot_be_loaded_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such directory"):
        load_tokenizer(TokenizerConfig(str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="cannot load the tokenizer of"):
        load_tokenizer(TokenizerConfig(str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{not json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="cannot load the tokenizer of") as raised:
        load_tokenizer(TokenizerConfig(str(tmp_path)))
    assert "\n" not in str(raised.value)


# ---- good rows


def test_special_tokens_are_added_to_texts_and_not_to_chats(tokenizers: dict[str, Any]) -> None:
    bos = tokenizers["bos"]
    text = PromptRenderer(PromptConfig(prompt_column="p"), bos).tokenize_row({"p": "hello"})
    assert text == [1, *bos.encode("hello", add_special_tokens=False)]
    chat = PromptRenderer(PromptConfig(prompt_column="p", as_chat=True), bos).tokenize_row({"p": " hello "})
    assert chat == bos.encode("<s>[INST] hello [/INST]", add_special_tokens=False)
    assert chat.count(1) == 1
    letters = tokenizers["parts"]
    assert PromptRenderer(PromptConfig(prompt_column="p"), letters).tokenize_row({"p": "ab"}) == [1, 68, 69, 2]


def test_a_given_completion_is_tokenized_together_with_its_prompt(tokenizers: dict[str, Any]) -> None:
    bos = tokenizers["bos"]
    renderer = PromptRenderer(PromptConfig(prompt_column="p", completion_column="c"), bos)
    rendered = renderer.render({"p": "hello", "c": " world"})
    assert rendered.token_ids == bos("hello world")["input_ids"]
    num_prompt_tokens = len(bos("hello")["input_ids"])
    assert rendered.num_completion_tokens == len(rendered.token_ids) - num_prompt_tokens > 0


def test_a_prompt_keeps_its_tokens_where_those_at_the_border_would_merge(tokenizers: dict[str, Any]) -> None:
    bos = tokenizers["bos"]
    assert bos("hello")["input_ids"][: len(bos("hel")["input_ids"])] != bos("hel")["input_ids"], "they merge here"
    renderer = PromptRenderer(PromptConfig(prompt_column="p", completion_column="c"), bos)
    rendered = renderer.render({"p": "hel", "c": "lo"})
    completion = bos("lo", add_special_tokens=False)["input_ids"]
    assert rendered[:3] == (bos("hel")["input_ids"] + completion, None, len(completion))
    letters = PromptRenderer(PromptConfig(prompt_column="p", completion_column="c"), tokenizers["parts"])
    assert letters.render({"p": "a", "c": "b"})[:3] == ([1, 68, 2, 69], None, 1), (
        "this tokenizer ends a prompt by a token"
    )


def test_a_given_completion_follows_a_chats_opening_of_the_answer_without_special_tokens(
    tokenizers: dict[str, Any],
) -> None:
    bos = tokenizers["bos"]
    renderer = PromptRenderer(PromptConfig(messages_column="m", completion_column="c"), bos)
    rendered = renderer.render({"m": HELLO, "c": " world"})
    assert rendered.token_ids == bos.encode("<s>[INST] hello [/INST] world", add_special_tokens=False)
    assert bos.decode(rendered.token_ids[-rendered.num_completion_tokens :]) == " world"


def test_a_given_completion_continues_a_prefill_and_follows_a_prompt_of_token_ids(tokenizers: dict[str, Any]) -> None:
    bos = tokenizers["bos"]
    keys = {"messages_column": "m", "prefill_column": "b", "completion_column": "c"}
    rendered = PromptRenderer(PromptConfig(**keys), bos).render({"m": HELLO, "b": "the quick", "c": " world"})
    assert bos.decode(rendered.token_ids).endswith("[/INST]the quick world"), "the prefill is a part of the prompt"
    assert bos.decode(rendered.token_ids[-rendered.num_completion_tokens :]) == " world"
    by_ids = PromptConfig(token_ids_column="ids", completion_column="c")
    completion = bos("lo", add_special_tokens=False)["input_ids"]
    assert PromptRenderer(by_ids, bos).render({"ids": [1, 5], "c": "lo"})[:3] == (
        [1, 5, *completion],
        None,
        len(completion),
    )
    make_text = make_prompt_text_fn(by_ids)
    assert make_text({"ids": [1, 5], "c": "a"}) != make_text({"ids": [1, 5], "c": "b"})


@pytest.mark.parametrize(
    ("completion", "error_type"),
    [
        ("", "empty_completion"),
        (None, "wrong_type"),
        (3, "wrong_type"),
        (["a"], "wrong_type"),
        ("\ud83d", "invalid_text"),
    ],
)
def test_a_bad_completion_is_rejected_with_its_type(
    tokenizers: dict[str, Any], completion: Any, error_type: str
) -> None:
    renderer = PromptRenderer(PromptConfig(prompt_column="p", completion_column="c"), tokenizers["bos"])
    with pytest.raises(RowRefused) as raised:
        renderer.render({"p": "hello", "c": completion})
    assert raised.value.type == error_type


def test_rows_that_differ_only_in_their_completion_are_no_samples_of_one_prompt() -> None:
    make_text = make_prompt_text_fn(PromptConfig(prompt_column="p", completion_column="c"))
    assert make_text({"p": "hello", "c": " world"}) == "hello world"
    with pytest.raises(RowRefused):
        make_text({"p": "hello", "c": None})


def test_a_template_reads_the_columns_of_a_row(tokenizers: dict[str, Any]) -> None:
    template = "{{ question }}|{{ context or '' }}|{{ tags[0] }}\n"
    renderer = PromptRenderer(PromptConfig(template=template), tokenizers["plain"])
    row = {"question": "<q>", "context": None, "tags": ["x"], "self": 1}
    assert renderer.build_prompt(row) == "<q>||x\n"
    assert tokenizers["plain"].decode(renderer.tokenize_row(row)) == "<q>||x\n"


def test_messages_are_passed_to_an_engine_that_renders(tokenizers: dict[str, Any]) -> None:
    config = PromptConfig(messages_column="m", system_prompt="be brief")
    row = {"m": [{"role": "user", "content": "hello", "name": None}]}
    # Without a tokenizer, since the engine renders.
    prompt = PromptRenderer(config, None).build_prompt(row)
    assert isinstance(prompt, dict)
    assert prompt["messages"] == [{"role": "system", "content": "be brief"}, *HELLO]
    assert row["m"][0]["name"] is None, "the row itself is not changed"


def test_nulls_that_datasets_fills_in_do_not_change_the_prompt(tokenizers: dict[str, Any]) -> None:
    rows = [
        {"m": [{"role": "user", "content": "hello"}]},
        {
            "m": [
                *HELLO,
                {**CALL, "content": "see", "reasoning": "hm"},
                {"role": "tool", "tool_call_id": "c1"},
            ]
        },
        {"m": [{"role": "user", "name": "ann", "content": "hello"}]},
    ]
    filled = datasets.Dataset.from_list(copy.deepcopy(rows))
    assert filled[0]["m"][0]["tool_calls"] is None
    for name in ("plain", "parts"):
        renderer = PromptRenderer(PromptConfig(messages_column="m"), tokenizers[name])
        assert [renderer.tokenize_row(row) for row in filled] == [renderer.tokenize_row(row) for row in rows]


def test_rendering_does_not_change_the_row(tokenizers: dict[str, Any]) -> None:
    row = {"m": [*HELLO, copy.deepcopy(CALL)]}
    before = copy.deepcopy(row)
    PromptRenderer(PromptConfig(messages_column="m"), tokenizers["plain"]).tokenize_row(row)
    assert row == before


def test_chat_keys_reach_the_template(tokenizers: dict[str, Any]) -> None:
    plain = tokenizers["plain"]

    def text(row: list[dict[str, Any]], **keys: Any) -> str:
        return plain.decode(PromptRenderer(PromptConfig(messages_column="m", **keys), plain).tokenize_row({"m": row}))

    assert text(HELLO).endswith("<|im_start|>assistant\n")
    assert text(HELLO, chat_template_kwargs={"enable_thinking": False}).endswith("<think></think>")
    assert text(HELLO, add_generation_prompt=False).endswith("hello<|im_end|>\n")
    opened = [*HELLO, {"role": "assistant", "content": "well"}]
    assert text(opened, add_generation_prompt=False, continue_final_message=True).endswith("assistant\nwell")
    assert text(HELLO, chat_template_kwargs={"tools": [{"name": "sum"}]}).startswith("<|im_start|>tools\n{")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"enable_thinkng": False}, "the chat template does not use 'enable_thinkng'; did you mean 'enable_thinking'?"),
        ({"reasoning": "high"}, "does not use 'reasoning'; its variables: enable_thinking"),
        ({"enable_thinking": True, "self": 1}, "does not use 'self'"),
    ],
)
def test_a_variable_that_the_chat_template_does_not_use_is_refused(
    tokenizers: dict[str, Any], kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        PromptRenderer(PromptConfig(messages_column="m", chat_template_kwargs=kwargs), tokenizers["plain"])
    assert len(raised.value.mistakes) == 1


@pytest.mark.parametrize(
    ("template", "kwargs", "prompt"),
    [
        ("{{ messages[0].content }}{% if date is defined %} {{ date }}{% endif %}", {"date": "now"}, "hello now"),
        ("{% if not date is defined %}{% set date = 'x' %}{% endif %}{{ date }}", {"date": "y"}, "y"),
        ("{{ messages[0].content }}", {"tools": [], "documents": [], "padding": False}, "hello"),
    ],
)
def test_variables_of_the_template_and_of_transformers_are_known(
    tokenizers: dict[str, Any], template: str, kwargs: dict[str, Any], prompt: str
) -> None:
    plain = tokenizers["plain"]
    config = PromptConfig(messages_column="m", chat_template=template, chat_template_kwargs=kwargs)
    assert plain.decode(PromptRenderer(config, plain).tokenize_row({"m": HELLO})) == prompt


def test_a_template_without_variables_says_so(tokenizers: dict[str, Any]) -> None:
    config = PromptConfig(messages_column="m", chat_template="{{ messages }}", chat_template_kwargs={"x": 1})
    with pytest.raises(ConfigError, match="does not use 'x', nor any other variable"):
        PromptRenderer(config, tokenizers["plain"])


@pytest.mark.parametrize(
    ("message", "string", "openai"),
    [
        ({"role": "user", "content": "a"}, "a", [{"type": "text", "text": "a"}]),
        ({"role": "user"}, "", []),
        (
            {"role": "user", "content": ["a", ""]},
            "a",
            [{"type": "text", "text": "a"}, {"type": "text", "text": ""}],
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "mark": 1}, {"type": "refusal"}, "b"]},
            "a\nb",
            [{"type": "text", "text": "a", "mark": 1}, {"type": "text", "text": "b"}],
        ),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]},
            "a",
            [{"type": "text", "text": "a"}],
        ),
        (
            {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
            "a",
            "a\n",
        ),
        (
            {"role": "tool", "content": [{"type": "tool_reference", "name": "t"}]},
            "t",
            [{"type": "tool_reference", "name": "t"}],
        ),
        (
            {"role": "system", "content": "x-anthropic-billing-header: 1\na"},
            "a",
            [{"type": "text", "text": "a"}],
        ),
    ],
)
def test_contents_are_converted_to_both_formats(message: dict[str, Any], string: str, openai: Any) -> None:
    (cleaned,) = validate_messages([message])
    assert to_conversation([cleaned], "string")[0]["content"] == string
    assert to_conversation([cleaned], "openai")[0]["content"] == openai


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": null}', {"a": None}), ({"a": 1}, {"a": 1}), ("{broken", {}), ("[1]", {}), ("", {}), (None, {})],
)
def test_tool_arguments_are_objects(arguments: Any, expected: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = validate_messages([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert to_conversation(messages, "string")[0]["tool_calls"][0]["function"]["arguments"] == expected


def test_only_the_keys_that_vllm_keeps_reach_the_template() -> None:
    full = {
        "role": "assistant",
        "content": "a",
        "name": "n",
        "task": "t",
        "tool_calls": [],
        "reasoning": "r",
        "reasoning_content": "dropped, as by vLLM",
        "tool_call_id": "of tools only",
        "weight": 1,
    }
    (message,) = to_conversation(validate_messages([full]), "string")
    assert message == {
        "role": "assistant",
        "content": "a",
        "name": "n",
        "task": "t",
        "reasoning": "r",
        "reasoning_content": "r",
    }


def test_developer_messages_join_the_system_message() -> None:
    conversation = [
        {"role": "user", "content": "u"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}], "tools": None},
        {"role": "system", "content": "s"},
    ]
    merged = [{"role": "system", "content": "d\n\ns"}, {"role": "user", "content": "u"}]
    assert merge_developer_role(conversation, "{{ messages }}") == merged
    assert merge_developer_role(conversation, "{{ 'developer' }}") == conversation
    first = [{"role": "developer", "content": "d", "tools": 1}, {"role": "user", "content": "u"}]
    assert merge_developer_role(first, "") == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "u"},
    ]


@pytest.mark.parametrize(("template", "expected"), CONTENT_FORMATS.items())
def test_the_content_format_is_read_from_the_template(template: str, expected: str) -> None:
    assert detect_content_format(template) == expected


def test_names_assigned_in_a_circle_do_not_hang_the_detection() -> None:
    assert detect_content_format("{% set a = messages %}{% set messages = a %}{{ messages }}") == "string"


# ---- bad rows

LONE = "half \ud83d of a pair"

BAD_TEXTS: list[tuple[dict[str, Any], Any, str]] = [
    ({"prompt_column": "p"}, None, "wrong_type"),
    ({"prompt_column": "p"}, 7, "wrong_type"),
    ({"prompt_column": "p"}, b"bytes", "wrong_type"),
    ({"prompt_column": "p"}, ["a"], "wrong_type"),
    ({"prompt_column": "p"}, {"a": 1}, "wrong_type"),
    ({"prompt_column": "p", "as_chat": True}, None, "wrong_type"),
    ({"prompt_column": "p"}, "", "empty_prompt"),
    ({"prompt_column": "p"}, LONE, "invalid_text"),
    ({"prompt_column": "p", "as_chat": True}, LONE, "invalid_text"),
    ({"template": "{{ p.missing }}"}, {"a": 1}, "template_failed"),
    ({"template": "{{ p }}"}, None, "template_failed"),
    ({"template": "{{ p + 1 }}"}, "a", "template_failed"),
    ({"template": "{{ 1 / p }}"}, 0, "template_failed"),
    ({"template": "{{ p.append(1) }}"}, [], "template_failed"),
    ({"template": "{{ p.__class__.__mro__ }}"}, "a", "template_failed"),
    ({"template": "{% for i in range(p) %}{% endfor %}"}, 10**9, "template_failed"),
    ({"template": "{% if p %}a{% endif %}"}, 0, "empty_prompt"),
    ({"template": "{{ p }}"}, LONE, "invalid_text"),
]

BAD_MESSAGES: list[tuple[Any, str]] = [
    (None, "wrong_type"),
    ('[{"role": "user", "content": "JSON text"}]', "wrong_type"),
    ({"role": ["user"], "content": ["columns"]}, "wrong_type"),
    (b"[]", "wrong_type"),
    (3, "wrong_type"),
    ([], "empty_prompt"),
    (["hello"], "wrong_type"),
    ([None], "wrong_type"),
    ([[{"role": "user", "content": "nested"}]], "wrong_type"),
    ([{"from": "human", "value": "ShareGPT"}], "wrong_type"),
    ([{"role": None, "content": "a"}], "wrong_type"),
    ([{"role": "user", "content": 3}], "wrong_type"),
    ([{"role": "user", "content": {"text": "a"}}], "wrong_type"),
    ([{"role": "user", "content": [None]}], "wrong_type"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "wrong_type"),
    ([{"role": "user", "content": [{"type": "input_text"}]}], "wrong_type"),
    ([{"role": "user", "content": [{"text": "no type"}]}], "unsupported_content"),
    ([{"role": "user", "content": [{"type": "text", "text": "a", "uuid": "u"}]}], "unsupported_content"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}, "uuid": "1"}]}],
        "unsupported_content",
    ),
    ([{"role": "user", "content": [{"type": "image"}]}], "media_mismatch"),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "wrong_type"),
    ([{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "x"}]}], "unsupported_content"),
    ([{"role": "user", "content": [{"type": ["text"], "text": "a"}]}], "unsupported_content"),
    ([{"role": "assistant", "tool_calls": "f()"}], "wrong_type"),
    ([{"role": "assistant", "tool_calls": ["f()"]}], "wrong_type"),
    ([{"role": "assistant", "tool_calls": [{"type": "custom", "function": {}}]}], "wrong_type"),
    ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], "wrong_type"),
    ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "9" * 5000}}]}], "wrong_type"),
    ([{"role": "tool", "content": "this template knows no tools"}], "chat_template_failed"),
    ([{"role": "user", "content": LONE}], "invalid_text"),
]


def reject(renderer: PromptRenderer, row: dict[str, Any]) -> RowRefused:
    with pytest.raises(RowRefused) as raised:
        renderer.tokenize_row(row)
    assert raised.value.message
    raised.value.message.encode("utf-8")
    return raised.value


@pytest.mark.parametrize(("keys", "value", "expected"), BAD_TEXTS)
def test_a_bad_text_is_rejected_with_its_type(
    tokenizers: dict[str, Any], keys: dict[str, Any], value: Any, expected: str
) -> None:
    renderer = PromptRenderer(PromptConfig(**keys), tokenizers["plain"])
    assert reject(renderer, {"p": value}).type == expected


@pytest.mark.parametrize(("value", "expected"), BAD_MESSAGES)
def test_bad_messages_are_rejected_with_their_type(tokenizers: dict[str, Any], value: Any, expected: str) -> None:
    renderer = PromptRenderer(PromptConfig(messages_column="m"), tokenizers["bos"])
    assert reject(renderer, {"m": value}).type == expected


def test_messages_nested_without_end_are_rejected(tokenizers: dict[str, Any]) -> None:
    loop: list[Any] = []
    loop.append(loop)
    renderer = PromptRenderer(PromptConfig(messages_column="m"), tokenizers["bos"])
    assert reject(renderer, {"m": [{"role": "user", "content": loop}]}).type == "wrong_type"


def test_a_missing_message_cannot_be_continued(tokenizers: dict[str, Any]) -> None:
    config = PromptConfig(messages_column="m", add_generation_prompt=False, continue_final_message=True)
    renderer = PromptRenderer(config, tokenizers["parts"])
    assert reject(renderer, {"m": [*HELLO, {"role": "assistant"}]}).type == "chat_template_failed"


def test_a_tokenizer_that_fails_rejects_one_row() -> None:
    def broken(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        raise KeyError(text)

    renderer = PromptRenderer(PromptConfig(prompt_column="p"), broken)
    assert reject(renderer, {"p": "a"}).type == "tokenizer_failed"


def test_an_empty_text_is_a_prompt_where_tokens_are_added(tokenizers: dict[str, Any]) -> None:
    assert PromptRenderer(PromptConfig(prompt_column="p"), tokenizers["bos"]).tokenize_row({"p": ""}) == [1]


def test_importing_the_renderer_loads_nothing_heavy() -> None:
    code = (
        "import sys, dpgen.data.prompts.render; print({'transformers', 'jinja2', 'torch', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            b"caf\xe9".decode("utf-8", "surrogateescape"),
            "character 3 is the byte 0xE9, which is not valid UTF-8 there: convert a file in another encoding, e.g. "
            "iconv -f WINDOWS-1252 -t UTF-8",
        ),
        ("ab\ud83d", "character 2 is half of a surrogate pair, which no encoding of text can hold"),
    ],
)
def test_text_that_is_no_text_is_rejected_with_what_is_wrong_in_it(text: str, reason: str) -> None:
    with pytest.raises(RowRefused) as raised:
        PromptRenderer(PromptConfig(prompt_column="q"), None).build_prompt({"q": text})
    assert (raised.value.type, raised.value.message) == ("invalid_text", reason)
