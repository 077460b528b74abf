"""Lines of batch files become the prompts and sampling parameters that vLLM's own server makes of them.

vLLM runs in a separate process and loads no model. This file, run as a script, is that process.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO
from helpers.tiny_model import save_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("engines")]  # one process answers for all

HELLO = [{"role": "user", "content": "hello world"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
STRICT = {"type": "function", "function": {"name": "sum", "description": "adds", "strict": True}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
FIELDS: list[dict[str, Any]] = [
    *({"max_tokens": 5}, {"max_completion_tokens": 7, "max_tokens": 9}, {"max_tokens": 300}, {"max_tokens": None}),
    *({"max_tokens": 0}, {"max_tokens": -3}, {"max_tokens": "5"}, {"max_tokens": "five"}, {"min_tokens": 2}),
    *({"temperature": 0}, {"temperature": 0.3, "seed": 5}, {"temperature": -1}, {"temperature": "hot"}),
    *({"top_p": 0.5, "top_k": 3, "min_p": 0.1}, {"top_p": 2}, {"n": 3}, {"n": 0}, {"n": None}, {"seed": None}),
    *({"seed": 2**63}, {"seed": -(2**63)}),
    *({"stop": "a"}, {"stop": ["a", "b"]}, {"stop": [1]}, {"stop_token_ids": [3, 4]}, {"stop": ""}),
    *({"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5}, {"presence_penalty": 9}),
    *({"logit_bias": {"5": 2.5}}, {"logit_bias": {"x": 1}}, {"bad_words": ["a b"]}, {"allowed_token_ids": [5, 6]}),
    *({"ignore_eos": True, "skip_special_tokens": False, "spaces_between_special_tokens": False},),
    *({"include_stop_str_in_output": True, "stop": ["x"]}, {"prompt_logprobs": 2}, {"prompt_logprobs": -5}),
    *({"response_format": {"type": "json_object"}}, {"response_format": {"type": "text"}}),
    *({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},),
    *({"response_format": {"type": "json_schema"}}, {"response_format": {"type": "yaml"}}, {"response_format": 3}),
    *({"structured_outputs": {"regex": "a+"}}, {"structured_outputs": {"choice": ["a", "b"]}}),
    *({"structured_outputs": {"json": SCHEMA}}, {"structured_outputs": {"json": {}, "regex": "a"}}),
    *({"guided_json": SCHEMA}, {"user": "me", "metadata": {"a": "b"}, "store": True}, {"vllm_xargs": {"a": 1}}),
    *({"truncate_prompt_tokens": 2}, {"truncate_prompt_tokens": 2, "truncation_side": "right"}),
    *({"cache_salt": "s"}, {"cache_salt": ""}, {"repetition_detection": {"max_pattern_size": 5, "min_count": 3}}),
]
CHAT_FIELDS: list[dict[str, Any]] = [
    {},
    *({"logprobs": True}, {"logprobs": True, "top_logprobs": 3}, {"top_logprobs": 3}, {"logprobs": 5}),
    *({"tools": [WEATHER]}, {"tools": [STRICT, WEATHER], "tool_choice": "none"}, {"tools": []}),
    *({"tools": [WEATHER], "tool_choice": "required"}, {"tool_choice": "auto"}, {"tools": "weather"}),
    *({"tools": [WEATHER, STRICT], "tool_choice": {"type": "function", "function": {"name": "weather"}}},),
    *({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},),
    *({"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},),
    *({"tools": [WEATHER], "tool_choice": None}, {"tools": [WEATHER], "tool_choice": "always"}),
    *({"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"unknown": 1}}),
    *({"chat_template_kwargs": {"tools": [WEATHER]}}, {"reasoning_effort": "low"}, {"reasoning_effort": "none"}),
    *({"documents": [{"title": "t", "text": "x"}]}, {"add_generation_prompt": False}, {"add_special_tokens": True}),
    *({"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}),
    *({"continue_final_message": True, "add_generation_prompt": True}, {"chat_template": "{{ 1 }}"}),
    *({"thinking_token_budget": 5}, {"include_reasoning": False}, {"tools": [{"type": "x"}]}),
]
MESSAGES: list[Any] = [
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [{"role": "system", "content": "be brief"}, *HELLO, {"role": "assistant", "content": "x", "name": "me"}, *HELLO],
    [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "9", "tool_call_id": "c"},
    ],
    [*HELLO, {"role": "assistant", "content": "x", "reasoning_content": "because"}, *HELLO],
    [{"role": "developer", "content": "rules"}, *HELLO],
    *([], None, "hello", [{"content": "x"}], [{"role": "user", "content": 3}], [7]),
]
PROMPTS: list[Any] = ["hello world", "", [5, 6, 7], ["hello"], [[5, 6]], [], None, 3, [-1], [99999], "word " * 400]


def make_lines() -> list[dict[str, Any]]:
    """Return the bodies of all cases, each with its URL."""
    chats = [{"messages": HELLO, **fields} for fields in [*FIELDS, *CHAT_FIELDS]]
    chats += [{"messages": messages} for messages in MESSAGES] + [
        {"messages": [{"role": "user", "content": "w " * 400}]}
    ]
    prompts = [
        {"prompt": "hello world", **fields} for fields in [*FIELDS, {"logprobs": 2}, {"add_special_tokens": False}]
    ]
    prompts += [{"prompt": prompt} for prompt in PROMPTS]
    lines = [{"url": "/v1/chat/completions", "body": body} for body in chats]
    return lines + [{"url": "/v1/completions", "body": body} for body in prompts]


CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}
ROME, PARIS = ({"name": "weather", "parameters": {"city": city}} for city in ("Rome", "Paris"))
ROME_CALL, PARIS_CALL = ['{"city": "Rome"}', '{"city": "Paris"}']
REQUIRED = {"tools": [WEATHER], "tool_choice": "required"}
# (vLLM's parser, fields of a chat, the model's text, the text that is left, the arguments of calls). hermes has a
# grammar of its own for calls that a request demands; others are made to write JSON.
ANSWERS: list[tuple[str, dict[str, Any], str, str, list[str]]] = [
    ("hermes", {"tools": [WEATHER]}, CALL_TEXT, "", [ROME_CALL]),
    ("hermes", {"tools": [WEATHER], "tool_choice": "none"}, CALL_TEXT, CALL_TEXT, []),
    ("hermes", {}, CALL_TEXT, CALL_TEXT, []),
    ("hermes", {"tools": [WEATHER]}, "sunny", "sunny", []),
    ("hermes", {"tools": [WEATHER], "tool_choice": NAMED}, CALL_TEXT, "", [ROME_CALL]),
    ("hermes", REQUIRED, f"{CALL_TEXT}\n{CALL_TEXT.replace('Rome', 'Paris')}", "", [ROME_CALL, PARIS_CALL]),
    ("hermes", {**REQUIRED, "parallel_tool_calls": False}, CALL_TEXT * 2, "", [ROME_CALL]),
    ("pythonic", {"tools": [WEATHER], "tool_choice": NAMED}, ROME_CALL, "", [ROME_CALL]),
    ("pythonic", REQUIRED, json.dumps([ROME, PARIS]), "", [ROME_CALL, PARIS_CALL]),
]
# The server takes a token id that the model does not have, and fails later.
MEANT = [{"prompt": [99999]}]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "m", "parts")
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]),
    }
    command = [sys.executable, __file__, str(folder), str(folder / "answers.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded: list[Any] = json.loads((folder / "answers.json").read_text())
    return loaded


def test_prompts_and_sampling_are_those_of_vllms_server(answers: list[Any]) -> None:
    lines, num_accepted = make_lines(), 0
    answers = answers[0]
    assert len(answers) == len(lines)
    differing = []
    for line, (theirs, ours) in zip(lines, answers, strict=True):
        num_accepted += isinstance(theirs, list)
        is_same = theirs == ours if isinstance(theirs, list) else isinstance(ours, str)
        if not is_same and line["body"] not in MEANT:
            differing.append(f"{json.dumps(line)[:300]}\n  vLLM  {str(theirs)[:900]}\n  dpgen {str(ours)[:900]}")
    assert not differing, "\n".join(differing)
    assert num_accepted > 80


def test_calls_are_read_as_the_request_demands_them(answers: list[Any]) -> None:
    for (parser, fields, text, left, arguments), answer in zip(ANSWERS, answers[1], strict=True):
        calls = [[f"call_3_0_{number}", "weather", value] for number, value in enumerate(arguments)]
        assert answer == [left, calls, None], (parser, fields, text)


# ---- the process with vLLM


def main(folder: str, answer: str) -> None:
    """Write [what vLLM's server makes of a line, what dpgen makes of it] for each line."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config

    config = EngineArgs(model=folder, dtype="float32", max_model_len=256).create_engine_config()
    renderer = renderer_from_config(config)
    results = []
    for line in make_lines():
        results.append(
            [_try(_serve, config.model_config, renderer, line), _try(_convert, config.model_config, renderer, line)]
        )
    Path(answer).write_text(json.dumps([results, _parse_answers(folder)]))


def _parse_answers(folder: str) -> list[Any]:
    from dpgen.data.tokenizer import TokenizerConfig
    from dpgen.engine.parsing.vllm_parsers import ParserSpec, ParseTask, start
    from dpgen.records import Completion, ServerRequest

    config = TokenizerConfig.from_engine(folder, {})
    handlers = {name: start(ParserSpec(config, tool_parser=name))[0] for name in ("hermes", "pythonic")}
    parsed = []
    for parser, fields, text, _, _ in ANSWERS:
        request = ServerRequest("/v1/chat/completions", fields)
        [completion] = handlers[parser](ParseTask(3, (Completion(text, "stop", 5),), request=request))
        calls = [[call.id, call.name, call.arguments] for call in completion.tool_calls]
        parsed.append([completion.text, calls, completion.parse_error])
    return parsed


def _try(make: Any, *arguments: Any) -> Any:
    try:
        token_ids, params = make(*deepcopy(arguments[-1:]), *arguments[:-1])
    except Exception as error:  # noqa: BLE001 - any error means that the line is rejected
        return f"{type(error).__name__}: {str(error)[:300]}"
    return [list(token_ids), repr(params)]


def _serve(line: dict[str, Any], model_config: Any, renderer: Any) -> Any:
    """Do as `create_chat_completion` and `create_completion`, which need a running engine."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
    from vllm.renderers.online_renderer import OnlineRenderer

    online = OnlineRenderer(
        model_config,
        renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=True,
        tool_parser="hermes",
    )
    body = {"seed": 11, **line["body"]} if line["body"].get("seed") is None else line["body"]
    body = {**body, "seed": body["seed"] or 11} if "seed" in body else body
    request: Any
    if line["url"] == "/v1/chat/completions":
        request = ChatCompletionRequest.model_validate(body)
        rendered: Any = asyncio.run(online.render_chat(request))
        if not isinstance(rendered, tuple):
            raise ValueError(rendered)
        [prompt] = rendered[1]
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    else:
        request = CompletionRequest.model_validate(body)
        rendered = asyncio.run(online.render_completion(request))
        if not isinstance(rendered, list):
            raise ValueError(rendered)
        [prompt] = rendered
        limit = request.max_tokens
    token_ids = prompt["prompt_token_ids"]
    defaults = model_config.get_diff_sampling_param()
    max_tokens = get_max_tokens(
        model_config.max_model_len,
        limit,
        len(token_ids),
        defaults,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
    )
    return token_ids, request.to_sampling_params(max_tokens, defaults)


def _convert(line: dict[str, Any], model_config: Any, renderer: Any) -> Any:
    from dpgen.config.prompt import PromptConfig
    from dpgen.data.prompts.render import PromptRenderer, add_server_requests
    from dpgen.data.tokenizer import TokenizerConfig, load_tokenizer
    from dpgen.engine.messages import RequestParsers
    from dpgen.engine.parsing.request_parsers import ParserMaker, find_parser_class
    from dpgen.engine.vllm.server_requests import RequestConverter
    from dpgen.records import Request, RequestId

    global _RANK
    if _RANK is None:
        prompt = PromptConfig(request_column="request")
        tokenizer_config = TokenizerConfig.from_engine(model_config.model, {})
        render = add_server_requests(PromptRenderer(prompt, load_tokenizer(tokenizer_config)).render, prompt)
        parser_class = find_parser_class(RequestParsers("hermes"), tokenizer_config, renderer.tokenizer)
        maker = ParserMaker(parser_class, renderer.tokenizer, {}, model_config)
        _RANK = render, RequestConverter(model_config, renderer.tokenizer, {}, (), maker)
    render, converter = _RANK
    text = json.dumps({"custom_id": "a", "method": "POST", **line})
    rendered = render({"request": text})
    assert rendered.token_ids is not None
    request = Request(RequestId(0), rendered.token_ids, sampling={"seed": 11}, server_request=rendered.server_request)
    params, token_ids, _ = converter.convert(request, rendered.token_ids)
    return token_ids, params


_RANK: Any = None


if __name__ == "__main__":
    main(*sys.argv[1:])
