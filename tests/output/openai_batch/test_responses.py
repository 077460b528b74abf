"""The response to a line of a batch file: what vLLM's server would answer, in OpenAI's own types."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from openai.types import Completion as OpenaiCompletion
from openai.types.chat import ChatCompletion

from dpgen.data.token_texts import TokenTexts
from dpgen.errors import ERROR_TYPES
from dpgen.logprobs import TokenLogprobs
from dpgen.output.openai_batch.errors import HTTP_ERRORS
from dpgen.output.openai_batch.responses import ResponseBuilder, RunFacts, format_response_line
from dpgen.records import Completion, RowError, RowResult, ToolCall

FACTS = RunFacts("0123456789abcdef", 1_700_000_000, "tiny", frozenset(["math"]))
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = ToolCall("call_0_0_0", "add", '{"a": 1}')
CHAT_KEYS = {
    *("id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage", "prompt_logprobs"),
    *("prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics"),
}


class Letters:
    """A tokenizer whose token is one byte of UTF-8."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")


def make_line(url: str = "/v1/chat/completions", custom_id: str = "a", **body: Any) -> str:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in url else {"prompt": "hi"}
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny", **prompt, **body}}
    )


def build(line: str, *completions: Completion, **result: Any) -> dict[str, Any]:
    builder = ResponseBuilder(FACTS, lambda: TokenTexts(Letters()))
    response = builder.build(line, RowResult(3, 5, completions, **result))
    read: dict[str, Any] = json.loads(format_response_line(response))
    assert read == response, "the line holds what was built"
    return read


def build_chat(*completions: Completion, **body: Any) -> dict[str, Any]:
    chat: dict[str, Any] = build(make_line(**body), *completions)["response"]["body"]
    ChatCompletion.model_validate(chat)
    return chat


def make_logprobs(token_ids: list[int], values: list[float], top: list[list[int]]) -> TokenLogprobs:
    k = len(top[0]) if top else 0
    return TokenLogprobs(
        np.array(token_ids, np.int32),
        np.array(values, np.float32),
        np.array(top, np.int32).reshape(-1),
        np.tile(np.arange(-1, -k - 1, -1, dtype=np.float32), len(token_ids)),
    )


# ---- the line


def test_a_response_has_the_fields_of_vllm_run_batch() -> None:
    line = build(make_line(), Completion("hello", "stop", 2, stop_reason="."))
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert (line["custom_id"], line["error"]) == ("a", None)
    assert list(line["response"]) == ["status_code", "request_id", "body"]
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert set(body) == CHAT_KEYS
    assert (body["object"], body["created"], body["model"]) == ("chat.completion", 1_700_000_000, "tiny")
    [choice] = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "stop", ".")
    assert choice["message"]["content"] == "hello"
    assert "tool_calls" not in choice["message"]
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def test_the_same_results_give_the_same_bytes_and_other_rows_other_ids() -> None:
    line, builder = make_line(), ResponseBuilder(FACTS)
    first, again, other = (builder.build(line, RowResult(row, 5, (Completion("x", "stop", 1),))) for row in (3, 3, 4))
    assert first == again
    ids = [
        {response["id"], response["response"]["request_id"], response["response"]["body"]["id"]}
        for response in (first, other)
    ]
    assert not ids[0] & ids[1]


def test_a_completion_has_openais_form_too() -> None:
    body = build(make_line("/v1/completions"), Completion("hello", "length", 2))["response"]["body"]
    OpenaiCompletion.model_validate(body)
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("hello", "length")


def test_samples_are_choices() -> None:
    body = build_chat(Completion("a", "stop", 2), Completion("b", "length", 3), n=2)
    assert [(choice["index"], choice["message"]["content"]) for choice in body["choices"]] == [(0, "a"), (1, "b")]
    assert body["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(("model", "name"), [("tiny", "tiny"), (None, "tiny"), ("math", "math")])
def test_the_model_is_the_adapter_of_the_request_or_the_served_name(model: str | None, name: str) -> None:
    assert build_chat(Completion("a", "stop", 2), model=model)["model"] == name


def test_facts_come_from_run_json() -> None:
    identity = {"model": "org/model", "engine": {"served_model_name": ["short", "other"]}, "lora": {"math": "/x"}}
    facts = RunFacts.from_metadata({"identity": identity, "created": 7})
    assert (facts.model, facts.created, facts.adapters) == ("short", 7, {"math"})
    assert RunFacts.from_metadata({"identity": {"model": "org/model"}}).model == "org/model"
    assert facts.key != RunFacts.from_metadata({"identity": {**identity, "seed": 1}}).key


def test_text_that_utf8_can_not_hold_is_escaped() -> None:
    assert build_chat(Completion("a\ud800", "stop", 1))["choices"][0]["message"]["content"] == "a\\ud800"


# ---- tools and reasoning


@pytest.mark.parametrize(
    ("choice", "finish_reason"),
    [
        (None, "tool_calls"),
        ("auto", "tool_calls"),
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "add"}}, "stop"),
    ],
)
def test_calls_are_in_the_message_and_named_by_the_finish_reason(choice: Any, finish_reason: str) -> None:
    body = build_chat(Completion("", "stop", 4, tool_calls=(CALL,)), tools=TOOLS, tool_choice=choice)
    [answer] = body["choices"]
    assert answer["finish_reason"] == finish_reason
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert answer["message"]["tool_calls"] == [{"id": "call_0_0_0", "type": "function", "function": function}]
    assert answer["message"]["content"] == (None if choice in (None, "auto") else "")


def test_one_call_is_kept_where_parallel_calls_are_not_wanted() -> None:
    completion = Completion("", "stop", 4, tool_calls=(CALL, CALL))
    body = build_chat(completion, tools=TOOLS, parallel_tool_calls=False)
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1


def test_a_request_without_tools_has_no_calls() -> None:
    body = build_chat(Completion("x", "stop", 4, tool_calls=(CALL,)), tools=TOOLS, tool_choice="none")
    assert "tool_calls" not in body["choices"][0]["message"]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_reasoning_is_in_the_message_unless_the_request_hides_it() -> None:
    completion = Completion("four", "stop", 4, reasoning="two and two")
    shown, hidden = build_chat(completion), build_chat(completion, include_reasoning=False)
    assert shown["choices"][0]["message"]["reasoning"] == "two and two"
    assert hidden["choices"][0]["message"]["reasoning"] is None
    assert build_chat(Completion("", "length", 4, reasoning="hm"))["choices"][0]["message"]["content"] is None
    dropped = Completion("", "length", 4, has_null_content=True)
    assert build_chat(dropped, include_reasoning=False)["choices"][0]["message"]["content"] is None


# ---- log-probabilities


def test_a_chats_logprobs_have_the_sampled_token_first() -> None:
    logprobs = make_logprobs([99, 97], [-2.5, -0.1], [[97, 98], [97, 98]])
    body = build_chat(Completion("ca", "stop", 2, logprobs=logprobs), logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert [(token["token"], token["logprob"], token["bytes"]) for token in content] == [
        ("c", -2.5, [99]),
        ("a", -0.1, [97]),
    ]
    assert [[token["token"] for token in position["top_logprobs"]] for position in content] == [["c", "a"], ["a", "b"]]


def test_logprobs_stay_out_of_responses_that_did_not_ask() -> None:
    logprobs = make_logprobs([97], [-1], [[97]])
    assert build_chat(Completion("a", "stop", 1, logprobs=logprobs))["choices"][0]["logprobs"] is None


def test_a_completions_logprobs_have_offsets_and_one_candidate_more() -> None:
    logprobs = make_logprobs([99, 97], [-2.5, -0.1], [[97], [97]])
    line = make_line("/v1/completions", logprobs=1)
    body = build(line, Completion("ca", "stop", 2, logprobs=logprobs))["response"]["body"]
    OpenaiCompletion.model_validate(body)
    assert body["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "token_logprobs": [-2.5, -0.1],
        "tokens": ["c", "a"],
        "top_logprobs": [{"c": -2.5, "a": -1.0}, {"a": -0.1}],
    }


def test_a_character_of_several_tokens_is_the_text_of_the_last() -> None:
    token_ids = list("é!".encode())
    body = build_chat(Completion("é!", "stop", 3, logprobs=make_logprobs(token_ids, [-1, -1, -1], [])), logprobs=True)
    assert [token["token"] for token in body["choices"][0]["logprobs"]["content"]] == ["", "é", "!"]


def test_tokens_are_ids_where_the_request_wants_them_so() -> None:
    completion = Completion("a", "stop", 1, logprobs=make_logprobs([97], [-1], []))
    body = build_chat(completion, logprobs=True, return_tokens_as_token_ids=True)
    assert body["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:97"


def test_a_prompts_logprobs_are_by_token_id() -> None:
    prompt = make_logprobs([97, 98], [float("nan"), -3], [[-1], [99]])
    line = build(make_line(prompt_logprobs=1), Completion("a", "stop", 1), prompt_logprobs=prompt)
    assert line["response"]["body"]["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -3.0, "rank": None, "decoded_token": "b"},
            "99": {"logprob": -1.0, "rank": 1, "decoded_token": "c"},
        },
    ]


def test_token_ids_are_there_where_the_request_wants_them() -> None:
    completion = Completion("a", "stop", 1, [97])
    assert build_chat(completion)["choices"][0]["token_ids"] is None
    assert build_chat(completion, return_token_ids=True)["choices"][0]["token_ids"] == [97]


@pytest.mark.parametrize("has_parser", [True, False])
def test_tokens_of_hidden_reasoning_are_hidden_where_there_is_a_parser(has_parser: bool) -> None:
    builder = ResponseBuilder(FACTS._replace(has_parser=has_parser), lambda: TokenTexts(Letters()))
    line = make_line(include_reasoning=False, return_token_ids=True, logprobs=True)
    completion = Completion("a", "stop", 1, [97], logprobs=make_logprobs([97], [-1], []))
    [choice] = builder.build(line, RowResult(3, 5, (completion,)))["response"]["body"]["choices"]
    assert [choice["token_ids"] is None, choice["logprobs"] is None] == [has_parser, has_parser]


# ---- echo


def test_an_echoed_prompt_comes_before_the_completion_with_its_logprobs() -> None:
    prompt = make_logprobs([97, 98], [float("nan"), -3], [[-1], [99]])
    completion = Completion("c", "stop", 1, logprobs=make_logprobs([99], [-0.5], [[97]]))
    line = make_line("/v1/completions", prompt="ab", echo=True, logprobs=1)
    body = build(line, completion, prompt_logprobs=prompt)["response"]["body"]
    [choice] = body["choices"]
    assert choice["text"] == "abc" and choice["prompt_logprobs"][0] is None
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [None, -3.0, -0.5],
        "tokens": ["a", "b", "c"],
        "top_logprobs": [None, {"b": -3.0, "c": -1.0}, {"c": -0.5, "a": -1.0}],
    }


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": ["ab"]}, "abc"),
        ({"prompt": "ab", "max_tokens": 0}, "ab"),
        ({"prompt": "ab", "return_token_ids": True}, "c"),
        ({"prompt": "ab", "echo": False}, "c"),
    ],
)
def test_an_echo_without_logprobs_is_the_prompts_text(fields: dict[str, Any], text: str) -> None:
    line = make_line("/v1/completions", **{"echo": True, **fields})
    [choice] = build(line, Completion("c", "stop", 1))["response"]["body"]["choices"]
    assert choice["text"] == text and choice["logprobs"] is None


@pytest.mark.parametrize(
    ("last", "fields", "content"),
    [
        ({"role": "assistant", "content": "so "}, {}, "so four"),
        ({"role": "assistant", "content": [{"type": "text", "text": "so"}, "on "]}, {}, "so\non four"),
        ({"role": "assistant", "content": None}, {}, "four"),
        ({"role": "user", "content": "2+2"}, {}, "four"),
        ({"role": "user", "content": "2+2="}, {"add_generation_prompt": False}, "2+2=four"),
    ],
)
def test_a_chat_echoes_its_last_message_if_the_answer_has_the_same_role(
    last: dict[str, Any], fields: dict[str, Any], content: str
) -> None:
    line = make_line(messages=[last], echo=True, **fields)
    [choice] = build(line, Completion("four", "stop", 1))["response"]["body"]["choices"]
    assert choice["message"]["content"] == content


# ---- errors


@pytest.mark.parametrize(
    ("type", "status", "name", "param"),
    [
        ("bad_request", 400, "BadRequestError", None),
        ("prompt_too_long", 400, "BadRequestError", "input_tokens"),
        ("bad_sampling", 400, "BadRequestError", None),
        ("unknown_model", 404, "NotFoundError", "model"),
        ("engine_refused", 500, "InternalServerError", None),
        ("poison_row", 500, "InternalServerError", None),
    ],
)
def test_an_error_has_its_status_where_vllm_run_batch_puts_it(
    type: str, status: int, name: str, param: str | None
) -> None:
    line = build(make_line(), error=RowError(type, "why"))
    assert line["response"]["status_code"] == status
    assert line["response"]["body"] is None
    error = {"message": "why", "type": name, "param": param, "code": status, "error_type": type}
    assert line["error"] == {"error": error}


def test_every_error_type_has_a_status() -> None:
    assert set(HTTP_ERRORS) == set(ERROR_TYPES)


def test_a_malformed_line_keeps_the_custom_id_that_can_be_read() -> None:
    error = RowError("bad_request", "no JSON")
    assert build('{"custom_id": "b", oops', error=error)["custom_id"] == "b"
    assert build("oops", error=error)["custom_id"] is None
