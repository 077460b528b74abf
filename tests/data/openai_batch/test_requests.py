"""Tests of `dpgen.data.openai_batch.requests`: the prompt of a line, and what of a line is rejected.

tests/engine/test_server_requests_vllm.py compares prompts and sampling with those of vLLM's server.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.bad_input import BAD_REQUESTS

from dpgen.config.prompt import PromptConfig
from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.data.openai_batch.requests import (
    find_max_tokens,
    is_constrained,
    lay_retry_over,
    read_server_request,
    select_plain_sampling,
)
from dpgen.data.prompts.render import PromptRenderer, RenderedPrompt, add_server_requests, make_prompt_text_fn
from dpgen.errors import RowRefused
from dpgen.records import Request, RequestId
from dpgen.scheduling.groups.adapters import AdapterConfig
from dpgen.scheduling.request_builder import RequestBuilder

CONFIG = PromptConfig(request_column="request")
HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def make_line(url: str = CHAT, **body: Any) -> str:
    body = {"messages": HELLO, **body} if url == CHAT else body
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body})


def build_prompt(line: str, config: PromptConfig = CONFIG) -> Any:
    return PromptRenderer(config, None).build_prompt({"request": line})


def reject(line: str) -> tuple[str, str]:
    with pytest.raises(RowRefused) as raised:
        build_prompt(line)
    return raised.value.type, raised.value.message


def test_a_chat_brings_its_messages_tools_and_variables() -> None:
    tool = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "f", "strict": True}}
    kwargs = {"enable_thinking": False, "style": None}
    config = PromptConfig(request_column="request", chat_template_kwargs={"style": "short"})
    prompt = build_prompt(make_line(tools=[tool], chat_template_kwargs=kwargs, add_generation_prompt=False), config)
    function = {"name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}
    assert prompt == {
        "messages": HELLO,
        "template_kwargs": {
            "style": "short",
            "enable_thinking": False,
            "tools": [{"type": "function", "function": function}],
        },
        "is_continued": False,
        "add_generation_prompt": False,
        "add_special_tokens": False,
    }
    assert list(prompt["template_kwargs"]["tools"][0]["function"]) == list(function), "templates print keys in order"


def test_the_reasoning_of_a_message_has_the_name_that_templates_know() -> None:
    message = {"role": "assistant", "content": "a", "reasoning_content": "because"}
    assert build_prompt(make_line(messages=[message]))["messages"] == [
        {"role": "assistant", "content": "a", "reasoning": "because"}
    ]


@pytest.mark.parametrize(("prompt", "expected"), [("hi", "hi"), (["hi"], "hi"), ([5, 6], [5, 6]), ([[5, 6]], [5, 6])])
def test_a_completion_takes_one_text_or_one_list_of_token_ids(prompt: Any, expected: Any) -> None:
    assert build_prompt(make_line(COMPLETIONS, prompt=prompt)) == expected


@pytest.mark.parametrize("case", BAD_REQUESTS, ids=[case[0] for case in BAD_REQUESTS])
def test_what_can_not_be_answered_is_a_typed_error(case: tuple[str, str, dict[str, Any], str, str]) -> None:
    _, url, body, error_type, words = case
    found_type, message = reject(json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}))
    assert found_type == error_type and words in message


def test_a_line_that_is_no_text_is_rejected() -> None:
    with pytest.raises(RowRefused, match="the line is null, not a text"):
        read_server_request(None)


@pytest.mark.parametrize(
    ("line", "limit", "sampling"),
    [
        (make_line(), None, {}),
        (make_line(max_tokens=5), 5, {"max_tokens": 5}),
        (make_line(max_tokens=5, max_completion_tokens=7), 7, {"max_tokens": 7}),
        (make_line(max_tokens="5"), None, {"max_tokens": "5"}),
        (make_line(logprobs=True, top_logprobs=3, n=2, seed=7), None, {"logprobs": 3, "n": 2, "seed": 7}),
        (make_line(logprobs=True), None, {"logprobs": 0}),
        (make_line(COMPLETIONS, prompt="a"), 16, {"max_tokens": 16}),
        (make_line(COMPLETIONS, prompt="a", max_tokens=None, logprobs=2), 16, {"max_tokens": 16, "logprobs": 2}),
        (make_line(COMPLETIONS, prompt="a", max_completion_tokens=3), 16, {"max_tokens": 16}),
        (make_line(COMPLETIONS, prompt="a", echo=True, max_tokens=0), 0, {"max_tokens": 1}),
        (
            make_line(COMPLETIONS, prompt="a", echo=True, logprobs=1),
            16,
            {"max_tokens": 16, "logprobs": 1, "prompt_logprobs": 1},
        ),
    ],
)
def test_limits_and_plain_fields_are_read_as_the_server_reads_them(
    line: str, limit: int | None, sampling: dict[str, Any]
) -> None:
    assert find_max_tokens(line) == limit
    assert select_plain_sampling(read_server_request(line)) == sampling


def test_prompts_are_compared_as_texts_without_what_is_not_about_them() -> None:
    make_text = make_prompt_text_fn(CONFIG)
    one, other = ({"request": make_line(max_tokens=limit, seed=limit)} for limit in (1, 2))
    assert make_text(one) == make_text(other) == "user\nhello"
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    assert make_text({"request": make_line(messages=[*HELLO, call])}) == "user\nhello\nassistant\n"


def build_request(line: str, **keys: Any) -> Any:
    data = DataConfig(path="in.jsonl", format="openai_batch")
    config = Config(run=RunConfig(dir="run"), data=data, **{"model": "/models/base", **keys})
    render = add_server_requests(lambda row: RenderedPrompt([1]), config.prompt)
    builder = RequestBuilder(
        render, 7, {}, base_sampling={"skip_special_tokens": False}, adapters=AdapterConfig.from_config(config)
    )
    return builder.build(0, {"request": line})


def test_a_request_carries_its_body_without_the_prompt_and_a_seed_of_the_rows_own() -> None:
    request = build_request(make_line(temperature=0.5))
    assert request.server_request.body == {"temperature": 0.5} and request.server_request.url == CHAT
    assert list(request.sampling) == ["seed"], "the parsers' needs follow from the body"


@pytest.mark.parametrize(
    ("model", "adapter"),
    [(None, None), ("", None), ("/models/base", None), ("base", None), ("served", None), ("math", "math")],
)
def test_a_line_names_the_model_or_an_adapter(model: str | None, adapter: str | None) -> None:
    keys = {"lora": {"math": "x", "code": "y"}, "engine": {"served_model_name": "served"}}
    assert build_request(make_line(model=model), **keys).adapter == adapter


def test_a_model_that_is_not_there_is_that_lines_error() -> None:
    with pytest.raises(
        RowRefused, match="the model 'gpt-4o' does not exist; models: /models/base, base, math"
    ) as raised:
        build_request(make_line(model="gpt-4o"), lora={"math": "x"})
    assert raised.value.type == "unknown_model"
    with pytest.raises(RowRefused, match="'model' is an int"):
        build_request(make_line(model=3))


def test_a_further_attempt_is_of_one_sample_and_its_sampling_comes_over_the_body() -> None:
    body = {"n": 4, "seed": 3, "temperature": 0, "max_completion_tokens": 9, "top_p": 0.5}
    sampling = {"n": 1, "seed": 77, "temperature": 0.9, "max_tokens": 50, "top_p": 1.0}
    names = {"temperature", "max_tokens"}
    first = Request(RequestId(5), [1], sampling=sampling)
    assert lay_retry_over(first, body, names) == body
    retry = Request(RequestId(5, 0, 2, 1), [1], sampling=sampling)
    assert lay_retry_over(retry, body, names) == {
        "n": 1,
        "seed": 77,
        "temperature": 0.9,
        "max_tokens": 50,
        "top_p": 0.5,
    }


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, False),
        ({"response_format": {"type": "text"}, "tool_choice": "auto"}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"regex": "a+"}}, True),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
    ],
)
def test_a_request_whose_text_follows_a_grammar_is_known(body: dict[str, Any], expected: bool) -> None:
    request = Request(RequestId(0), [1], server_request=read_server_request(make_line(**body)))
    assert is_constrained(request) is expected
