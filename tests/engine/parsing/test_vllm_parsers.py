"""Test that reasoning, calls and JSON are taken out of texts, with vLLM's own parsers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_tokenizers import add_special_tokens, save_tokenizer

from dpgen.data.tokenizer import TokenizerConfig
from dpgen.engine.parsing.json_text import read_json
from dpgen.engine.parsing.vllm_parsers import ParserSpec, ParseTask, start
from dpgen.records import Completion, ToolCall

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    folder = save_tokenizer("plain", tmp_path_factory.mktemp("model"))
    add_special_tokens(folder, "<think>", "</think>", "<tool_call>", "</tool_call>")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return TokenizerConfig.from_engine(str(folder), {})


def parse(spec: ParserSpec, *texts: str, tools: Any = None) -> list[Completion]:
    handle, _ = start(spec)
    completions = tuple(Completion(text, "stop", 3, [1, 2, 3]) for text in texts)
    return list(handle(ParseTask(7, completions, tools)))


@pytest.mark.vllm
@pytest.mark.parametrize("parser", ["auto", "qwen3", "deepseek_r1", "glm45"])
def test_reasoning_leaves_the_text(tokenizer: TokenizerConfig, parser: str) -> None:
    [thought, broken_off] = parse(ParserSpec(tokenizer, parser), "<think>a b</think>the answer", "<think>too long")
    assert (thought.reasoning, thought.text) == ("a b", "the answer")
    assert (broken_off.reasoning, broken_off.text) == ("too long", ""), "the answer is what comes after the thoughts"
    assert (thought.num_tokens, thought.token_ids) == (3, [1, 2, 3]), "tokens are counted and kept whole"
    [stripped] = parse(ParserSpec(tokenizer, parser, keep_reasoning=False), "<think>a b</think>the answer")
    assert (stripped.reasoning, stripped.text) == (None, "the answer")


@pytest.mark.vllm
def test_calls_leave_the_text_with_ids_that_are_the_same_in_every_attempt(tokenizer: TokenizerConfig) -> None:
    spec = ParserSpec(tokenizer, "qwen3", "hermes")
    texts = [f"<think>hm</think>I call.{CALL}{CALL}", "<think>hm</think>no call", f"<think></think>{CALL}"]
    two, none, one = parse(spec, *texts, tools=TOOLS)
    assert two.text == "I call." and two.reasoning == "hm"
    assert two.tool_calls == (ToolCall("call_7_0_0", "f", '{"x": 1}'), ToolCall("call_7_0_1", "f", '{"x": 1}'))
    assert (none.text, none.tool_calls) == ("no call", ())
    assert (one.text, one.tool_calls) == ("", (ToolCall("call_7_2_0", "f", '{"x": 1}'),))


@pytest.mark.vllm
def test_a_call_that_is_broken_off_stays_in_the_text(tokenizer: TokenizerConfig) -> None:
    broken = '<tool_call>\n{"name": "f", "argum'
    [completion] = parse(ParserSpec(tokenizer, None, "hermes"), broken, tools=TOOLS)
    assert (completion.text, completion.tool_calls) == (broken, ())


@pytest.mark.vllm
def test_special_tokens_are_kept_in_the_text_where_a_parser_looks_for_them(tokenizer: TokenizerConfig) -> None:
    assert start(ParserSpec(tokenizer, "deepseek_r1"))[1].sampling == {}
    assert start(ParserSpec(tokenizer, None, "hermes"))[1].sampling == {"skip_special_tokens": False}


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("qwen", None), "output.reasoning_parser=qwen is no parser of this vLLM; did you mean 'qwen3'? Its parsers: "),
        ((None, "hermess"), "output.tool_parser=hermess is no parser of this vLLM; did you mean 'hermes'?"),
        (("mistral", None), "output.reasoning_parser=mistral can't be used with this model: "),
        ((None, "llama3_json"), "output.tool_parser=llama3_json can't be used with this model: "),
        (("openai_gptoss", None), "vLLM's parser openai_gptoss reads only the streams of vLLM's server"),
    ],
)
def test_a_parser_that_does_not_fit_is_refused_at_the_start(
    tokenizer: TokenizerConfig, names: tuple[str | None, str | None], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        start(ParserSpec(tokenizer, *names))
    assert str(raised.value).startswith(message)


@pytest.mark.vllm
def test_a_model_that_does_not_tell_how_it_thinks_is_refused(tmp_path: Path) -> None:
    folder = save_tokenizer("bos", tmp_path)
    with pytest.raises(ValueError, match="nothing says how a model of the type None writes"):
        start(ParserSpec(TokenizerConfig.from_engine(str(folder), {}), "auto"))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ('{"b": [1, 2.50], "a": null}', '{"b":[1,2.5],"a":null}'),
        (' \n"é\\u00e9\\n" \n', '"éé\\n"'),
        ('```json\n{"a": 1}\n```', '{"a":1}'),
        ("```\n[1]\n```\n", "[1]"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("-0.0", "-0.0"),
    ],
)
def test_json_is_read_whole(text: str, parsed: str) -> None:
    [completion] = parse(ParserSpec(None, parse_json=True), text)
    assert (completion.parsed, completion.parse_error, completion.text) == (parsed, None, text)
    assert read_json(parsed).canonical == parsed


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no JSON: the text is empty"),
        ('{"a": 1', "no JSON: Expecting ',' delimiter at character 7 of 7"),
        ('{"a": 1} and so on', "no JSON: Extra data at character 9 of 18"),
        ("[NaN]", "no JSON: NaN is no JSON"),
        ("1e999", "no JSON: 1e999 is beyond what a float holds"),
        ('"\\ud800"', "no JSON: it holds half of a surrogate pair"),
        ("[" * 100_000, "no JSON: it is nested too deep"),
        ("Sure: ```json\n1\n```", "no JSON: Expecting value at character 0 of 19"),
    ],
)
def test_a_text_that_is_no_json_stays_and_says_why(text: str, error: str) -> None:
    [completion] = parse(ParserSpec(None, parse_json=True), text)
    assert (completion.parsed, completion.parse_error, completion.text) == (None, error, text)
