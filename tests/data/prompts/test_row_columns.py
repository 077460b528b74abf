"""Parts of a prompt come from columns: token ids, system prompts, prefills, tools, variables of the chat template."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pytest
from helpers import tiny_tokenizers
from helpers.dataset_files import make_rows

from dpgen.config.prompt import PromptConfig
from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.data.model_identity import hash_chat_template
from dpgen.data.prompts.columns import check_prompt_columns, select_prompt_columns
from dpgen.data.prompts.render import PromptRenderer, make_prompt_text_fn
from dpgen.data.prompts.token_ids import reject_unknown_ids
from dpgen.data.tokenizer import TokenizerConfig, load_tokenizer
from dpgen.engine.starting.launch import build_text_pipeline
from dpgen.engine.starting.log_file import EngineLog
from dpgen.engine.vllm.vllm_render import count_vocabulary
from dpgen.errors import ConfigError, RowRefused

HELLO = [{"role": "user", "content": "hello"}]
SUM = {"name": "sum", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
SUM_TOOL = {"type": "function", "function": SUM}
MUL_TOOL = {"type": "function", "function": {"name": "mul"}}
OPENING = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a tokenizer whose chat template takes tools, and the variable enable_thinking."""
    return load_tokenizer(TokenizerConfig(str(tiny_tokenizers.save_tokenizer("plain", tmp_path_factory.mktemp("t")))))


@pytest.fixture(scope="module")
def several(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the same with three templates by name, as a folder with `additional_chat_templates` gives it."""
    tokenizer, folder = copy.deepcopy(plain), tmp_path_factory.mktemp("several")
    tokenizer.chat_template = {
        "default": "D:{{ messages[0].content }}",
        "tool_use": "T:{{ tools | tojson }}{{ messages[0].content }}{{ extra }}",
        "rag": "R:{{ documents }}{{ messages[0].content }}",
    }
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").exists()
    return load_tokenizer(TokenizerConfig(str(folder)))


def render(tokenizer: Any, row: dict[str, Any], *, has_added_nulls: bool = True, **keys: Any) -> str:
    """Return the text of a row's prompt; the messages are hello unless the row has others."""
    config = PromptConfig(messages_column="messages", **keys)
    row = {"messages": HELLO, **row}
    columns = select_prompt_columns(config, list(row))
    renderer = PromptRenderer(config, tokenizer, has_added_nulls=has_added_nulls)
    return str(tokenizer.decode(renderer.tokenize_row({name: row[name] for name in columns})))


def refuse(tokenizer: Any, row: dict[str, Any], **keys: Any) -> tuple[str, str]:
    with pytest.raises(RowRefused) as raised:
        render(tokenizer, row, **keys)
    return raised.value.type, str(raised.value)


# ---- token ids


def test_a_prompt_of_token_ids_is_taken_as_it_is(plain: Any) -> None:
    config = PromptConfig(token_ids_column="ids")
    rows = datasets.Dataset.from_dict({"ids": [[5, 0, 319], [7]]})
    assert [PromptRenderer(config, plain).tokenize_row(row) for row in rows] == [[5, 0, 319], [7]]
    assert PromptRenderer(config, None).build_prompt({"ids": [5, 10**9]}) == [5, 10**9], "only the engine knows better"


@pytest.mark.parametrize(
    ("value", "expected", "words"),
    [
        (None, "wrong_type", "ids is null, not a list of token ids"),
        ("1 2", "wrong_type", "ids is a str"),
        (3, "wrong_type", "ids is an int"),
        ({"a": 1}, "wrong_type", "ids is a dict"),
        ([1, None], "wrong_type", "item 1 is null, not a whole number"),
        ([1.0], "wrong_type", "item 0 is a float"),
        ([True], "wrong_type", "item 0 is a bool"),
        (["1"], "wrong_type", "item 0 is a str"),
        ([[1]], "wrong_type", "item 0 is a list"),
        ([], "empty_prompt", "ids has no token ids"),
        ([3, -1], "out_of_vocabulary", "the token id -1, which is negative"),
        ([3, 320], "out_of_vocabulary", "the token id 320; the vocabulary ends at 319"),
        ([10**30], "out_of_vocabulary", "the token id 1000000"),
    ],
)
def test_what_is_no_list_of_token_ids_is_refused(plain: Any, value: Any, expected: str, words: str) -> None:
    assert len(plain) == 320
    with pytest.raises(RowRefused) as raised:
        PromptRenderer(PromptConfig(token_ids_column="ids"), plain).tokenize_row({"ids": value})
    assert (raised.value.type, words in str(raised.value)) == (expected, True), raised.value


def test_token_ids_are_compared_and_measured_like_texts_of_four_characters_a_token() -> None:
    text_of = make_prompt_text_fn(PromptConfig(token_ids_column="ids"))
    shared, other = text_of({"ids": [1, 2, 70_000, 3]}), text_of({"ids": [1, 2, 70_000, 4]})
    assert len(shared) == len(other) == 16
    assert shared[:12] == other[:12] and shared != other
    assert text_of({"ids": [10**30]}), "whatever the engine will say"


def test_token_ids_need_no_tokenizer_where_the_engine_has_none() -> None:
    data = DataConfig(path="rows.jsonl", token_ids_column="ids")
    config = Config(run=RunConfig(dir="d"), data=data, model="/none", engine={"skip_tokenizer_init": True})
    pipeline = build_text_pipeline(config, EngineLog("warning"), make_rows(pa.table({"ids": [[1]]})))
    assert pipeline.render({"ids": [1, 2]})[:3] == ([1, 2], None, 0) and pipeline.detokenizer is None
    assert pipeline.engine_text_config.prompt_config == config.prompt, "so that the engine checks the ids"
    scored = dataclasses.replace(config, data=dataclasses.replace(data, completion_column="answer"))
    with pytest.raises(ConfigError, match=r"data\.completion_column needs a tokenizer that transformers can load"):
        build_text_pipeline(scored, EngineLog("warning"), make_rows(pa.table({"ids": [[1]]})))


@pytest.mark.parametrize(
    ("tokenizer", "num_ids"), [(None, 512), (SimpleNamespace(max_token_id=319), 320)], ids=["none", "one of vLLM's"]
)
def test_the_engine_refuses_token_ids_of_which_only_it_knows_the_vocabulary(tokenizer: Any, num_ids: int) -> None:
    model_config = SimpleNamespace(get_vocab_size=lambda: 512)
    engine = SimpleNamespace(renderer=SimpleNamespace(tokenizer=tokenizer, model_config=model_config))
    assert count_vocabulary(engine) == num_ids
    reject_unknown_ids([1, num_ids - 1], num_ids)
    with pytest.raises(RowRefused, match=f"the token id {num_ids}; the vocabulary ends at {num_ids - 1}") as raised:
        reject_unknown_ids([1, num_ids], num_ids)
    assert raised.value.type == "out_of_vocabulary"


# ---- system prompts and prefills


@pytest.mark.parametrize(
    ("value", "system"), [("be kind", "be kind"), (None, "be brief"), ("", ""), ("naïve 🤗", "naïve 🤗")]
)
def test_a_rows_system_prompt_takes_the_place_of_the_runs(plain: Any, value: str | None, system: str) -> None:
    text = render(plain, {"s": value}, system_prompt="be brief", system_prompt_column="s")
    assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user")
    if value is None:
        assert render(plain, {"s": None}, system_prompt_column="s").startswith("<|im_start|>user"), "none at all"


@pytest.mark.parametrize("prefill", ["Sure", "Sure, ", " a\n b ", "<think>\n", "{", "naïve 🤗"])
def test_the_model_continues_a_prefill(plain: Any, prefill: str) -> None:
    assert render(plain, {"p": prefill}, prefill_column="p").endswith(OPENING + prefill)


def test_a_row_without_a_prefill_is_opened_as_the_run_says(plain: Any) -> None:
    for value in (None, ""):
        assert render(plain, {"p": value}, prefill_column="p").endswith(OPENING)
        closed = render(plain, {"p": value}, prefill_column="p", add_generation_prompt=False)
        assert closed.endswith("hello<|im_end|>\n")
    assert render(plain, {"p": "x"}, prefill_column="p", add_generation_prompt=False).endswith(f"{OPENING}x")


def test_a_prefill_is_put_before_no_other_row(plain: Any) -> None:
    row = {"messages": copy.deepcopy(HELLO), "p": "x"}
    before = copy.deepcopy(row)
    render(plain, row, prefill_column="p")
    assert row == before


@pytest.mark.parametrize("key", ["system_prompt_column", "prefill_column"])
@pytest.mark.parametrize("value", [3, ["x"], {"a": "x"}, b"x"])
def test_a_part_of_a_prompt_that_is_no_text_is_refused(plain: Any, key: str, value: Any) -> None:
    error_type, message = refuse(plain, {"c": value}, **{key: "c"})
    assert error_type == "wrong_type" and message.startswith("c is a") and message.endswith(", not a string")


def test_a_prefill_that_no_encoding_can_hold_is_refused(plain: Any) -> None:
    assert refuse(plain, {"p": "a\ud800"}, prefill_column="p")[0] == "invalid_text"


def test_a_prefill_that_the_chat_template_drops_is_refused(plain: Any) -> None:
    template = "{{ messages[0].content }}"
    error_type, message = refuse(plain, {"p": "Sure"}, prefill_column="p", chat_template=template)
    assert error_type == "chat_template_failed" and "final message" in message


# ---- variables of the chat template


@pytest.mark.parametrize(
    ("value", "is_thinking"),
    [
        (None, True),
        ({"enable_thinking": False}, False),
        ('{"enable_thinking": false}', False),
        ({"enable_thinking": None}, True),
        (" ", True),
        ("{}", True),
    ],
)
def test_a_rows_variables_are_laid_over_the_runs(plain: Any, value: Any, is_thinking: bool) -> None:
    for kwargs in ({}, {"enable_thinking": True}):
        text = render(plain, {"k": value}, chat_template_kwargs=kwargs, chat_template_kwargs_column="k")
        assert text.endswith("<think></think>") is not is_thinking


def test_a_null_that_the_input_itself_has_reaches_the_template(plain: Any) -> None:
    template = "{{ messages[0].content }}{{ x is none }}"
    keys = {"chat_template": template, "chat_template_kwargs_column": "k"}
    assert render(plain, {"k": {"x": None}}, has_added_nulls=False, **keys) == "helloTrue"
    assert render(plain, {"k": '{"x": null}'}, **keys) == "helloTrue"
    assert render(plain, {"k": {"x": None}}, **keys) == "helloFalse"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"enable_thinkng": False}, "does not use 'enable_thinkng'; did you mean 'enable_thinking'?"),
        ('{"zzz": 1}', "does not use 'zzz'; its variables: enable_thinking"),
        ({"tokenize": True}, "k may not hold tokenize, which has a key of its own"),
        ({"messages": []}, "k may not hold messages"),
        ('{"enable', "k: the text is not valid JSON"),
        ("[" * 100_000, "k: the JSON text is nested too deep"),
        ("[1]", "k is a list, not an object"),
        (3, "k is an int, not an object"),
        ([("enable_thinking", False)], "k is a list, not an object"),
    ],
)
def test_variables_that_the_template_cannot_use_are_the_rows_error(plain: Any, value: Any, words: str) -> None:
    error_type, message = refuse(plain, {"k": value}, chat_template_kwargs_column="k")
    assert error_type == "bad_template_kwargs" and words in message


# ---- tools


@pytest.mark.parametrize(
    "value", [[SUM_TOOL], [SUM], json.dumps([SUM_TOOL]), json.dumps(SUM), SUM_TOOL, [json.dumps(SUM)]]
)
def test_tools_reach_the_chat_template_in_openais_form(plain: Any, value: Any) -> None:
    expected = f"<|im_start|>tools\n{json.dumps(SUM_TOOL)}\n<|im_end|>\n"
    assert render(plain, {"t": value}, tools_column="t").startswith(expected)
    assert render(plain, {}, tools=value).startswith(expected)


def test_a_rows_tools_take_the_place_of_the_runs(plain: Any) -> None:
    keys = {"tools": [MUL_TOOL], "tools_column": "t"}
    assert '"sum"' in (text := render(plain, {"t": [SUM]}, **keys)) and '"mul"' not in text
    for value in (None, " "):
        assert '"mul"' in render(plain, {"t": value}, **keys)
    for value in ([], "[]"):
        assert "tools" not in render(plain, {"t": value}, **keys)
        assert "tools" not in render(plain, {"t": value}, tools_column="t")
    assert "tools" not in render(plain, {"t": None}, tools_column="t")


def test_nulls_that_arrow_added_to_tools_are_dropped(plain: Any) -> None:
    other = {"name": "mul", "parameters": {"properties": {"b": {"enum": [1]}}, "required": ["b"]}, "description": "d"}
    filled = datasets.Dataset.from_list([{"t": [SUM]}, {"t": [other]}])
    assert filled[0]["t"][0]["description"] is None
    for row, tool in zip(filled, (SUM, other), strict=True):
        assert render(plain, row, tools_column="t") == render(plain, {"t": [tool]}, tools_column="t")
    tool = {"name": "f", "parameters": {"default": None}}
    assert '"default": null' in render(plain, {"t": [tool]}, has_added_nulls=False, tools_column="t")
    assert '"default": null' in render(plain, {"t": json.dumps([tool])}, tools_column="t")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "t: tools are an int, not a list of functions"),
        ("nonsense", "t: the text is not valid JSON"),
        ([{"parameters": {}}], "t: tool 0 has no 'name'"),
        ([SUM, None], "t: tool 1 is null"),
        ([{"type": "web_search"}], "t: tool 0 has the type 'web_search'"),
    ],
)
def test_what_is_no_tool_is_the_rows_error(plain: Any, value: Any, words: str) -> None:
    error_type, message = refuse(plain, {"t": value}, tools_column="t")
    assert error_type == "bad_tools" and words in message


def test_tools_are_given_in_one_place(plain: Any) -> None:
    assert '"sum"' in render(plain, {"k": {"tools": [SUM]}}, chat_template_kwargs_column="k")
    keys = {"tools_column": "t", "chat_template_kwargs_column": "k"}
    error_type, message = refuse(plain, {"k": {"tools": [SUM]}, "t": None}, **keys)
    assert error_type == "bad_template_kwargs" and "may not hold tools" in message


@pytest.mark.parametrize(
    ("keys", "key"), [({"tools": [SUM]}, "data.tools"), ({"tools_column": "t"}, "data.tools_column")]
)
def test_tools_need_a_template_that_uses_them(plain: Any, keys: dict[str, Any], key: str) -> None:
    config = PromptConfig(messages_column="m", chat_template="{{ messages }}", **keys)
    with pytest.raises(ConfigError, match=f"{key}: the chat template does not use 'tools'"):
        PromptRenderer(config, plain)


# ---- templates by name


def test_a_chat_template_is_chosen_by_its_name(several: Any, plain: Any) -> None:
    assert render(several, {}) == "D:hello"
    assert render(several, {}, chat_template={"name": "rag"}) == "R:Nonehello"
    assert render(several, {}, chat_template={"name": "default"}) == "D:hello"
    named = render(several, {"t": None}, chat_template={"name": "tool_use"}, tools_column="t")
    assert named == "T:nullhello"
    assert render(plain, {}, chat_template={"name": "default"}) == render(plain, {})
    assert hash_chat_template(PromptConfig(messages_column="m", chat_template={"name": "rag"})) is None


def test_a_tokenizer_chooses_its_template_for_tools_row_by_row(several: Any) -> None:
    assert render(several, {"t": [SUM]}, tools_column="t") == f"T:{json.dumps([SUM_TOOL])}hello"
    assert render(several, {"t": None}, tools_column="t") == "D:hello"
    assert render(several, {}, tools=[SUM]).startswith("T:")
    keys = {"tools_column": "t", "chat_template_kwargs_column": "k"}
    assert render(several, {"t": [SUM], "k": {"extra": "!"}}, **keys).endswith("hello!")
    error_type, message = refuse(several, {"t": None, "k": {"extra": "!"}}, **keys)
    assert error_type == "bad_template_kwargs" and "'extra'" in message, "the other template does not use it"


def test_an_unknown_name_of_a_chat_template_is_refused_with_those_that_exist(several: Any, plain: Any) -> None:
    config = PromptConfig(messages_column="m", chat_template={"name": "tool_us"})
    words = "data.chat_template.name=tool_us: the tokenizer has no chat template of this name"
    with pytest.raises(ConfigError, match=f"{words}; did you mean 'tool_use'. chat templates: default, rag, tool_use"):
        PromptRenderer(config, several)
    with pytest.raises(ConfigError, match=f"{words}; chat templates: default"):
        PromptRenderer(config, plain)
    without = copy.deepcopy(plain)
    without.chat_template = None
    with pytest.raises(ConfigError, match=r"data\.chat_template\.name=tool_us: the tokenizer has no chat template"):
        PromptRenderer(config, without)
    with pytest.raises(ConfigError, match=r"can't be read: .*; one of the tokenizer's by its name is {name: tool_use}"):
        PromptRenderer(PromptConfig(messages_column="m", chat_template="tool_use"), several)


# ---- which columns are read


ALL_KEYS = {
    "template": "{{ row['the question'] }} {{ a_b }}",
    "as_chat": True,
    "system_prompt_column": "s",
    "prefill_column": "p",
    "tools_column": "t",
    "chat_template_kwargs_column": "k",
}
COLUMNS = ["s", "the question", "unused", "a_b", "p", "t", "k", "a-b"]


def test_only_columns_that_a_prompt_is_made_of_are_read() -> None:
    config = PromptConfig(**ALL_KEYS)
    check_prompt_columns(config, COLUMNS)
    assert sorted(select_prompt_columns(config, COLUMNS)) == sorted(set(COLUMNS) - {"unused", "a-b"})
    assert select_prompt_columns(PromptConfig(token_ids_column="unused"), COLUMNS) == ["unused"]
    same = PromptConfig(prompt_column="s", as_chat=True, prefill_column="s")
    assert select_prompt_columns(same, COLUMNS) == ["s"], "each once"


def test_all_missing_columns_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_prompt_columns(PromptConfig(**ALL_KEYS), ["the question", "tt"])
    keys = [mistake.partition(":")[0] for mistake in raised.value.mistakes]
    columns = ["system_prompt_column", "prefill_column", "chat_template_kwargs_column", "tools_column"]
    assert keys == [*(f"data.{key}" for key in columns), "data.template"]
    with pytest.raises(
        ConfigError, match=r"data\.token_ids_column: 'id' is no column of the dataset; did you mean 'ids'"
    ):
        check_prompt_columns(PromptConfig(token_ids_column="id"), ["ids"])


def test_rows_are_ordered_by_all_that_their_prompts_hold() -> None:
    config = PromptConfig(messages_column="m", tools_column="t", system_prompt_column="s", prefill_column="p")
    text_of = make_prompt_text_fn(config)
    row = {"m": HELLO, "t": None, "s": None, "p": None}
    assert text_of(row) == "user\nhello"
    assert text_of({**row, "s": "S", "p": "P"}) == "system\nS\nuser\nhello\nassistant\nP"
    assert "sum" in text_of({**row, "t": [SUM]}).splitlines()[0], "tools stand in front, as in most templates"


# ---- the fake engine


def test_the_fake_engine_takes_all_of_it(tmp_path: Path) -> None:
    def make_ids(row: dict[str, Any], **keys: Any) -> Any:
        data = DataConfig(path="rows.jsonl", **keys)
        config = Config(run=RunConfig(dir="d", engine="fake"), data=data, model="m")
        return build_text_pipeline(config, EngineLog("warning"), make_rows(pa.table({"ids": [[1]]}))).render(row)

    assert make_ids({"ids": [1, 70_000]}, token_ids_column="ids")[:3] == ([1, 70_000], None, 0)
    row = {"m": HELLO, "t": [SUM], "p": "P"}
    ids = [
        make_ids(row, messages_column="m", **keys)[0] for keys in ({}, {"tools_column": "t"}, {"prefill_column": "p"})
    ]
    assert bytes(ids[0]).decode() == str(HELLO), "as in older versions"
    assert len(set(map(tuple, ids))) == 3, "what differs in the prompt differs in the text"
