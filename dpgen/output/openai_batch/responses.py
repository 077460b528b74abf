"""Build the response to one line of a batch file, as vLLM's server and `vllm run-batch` would write it.

- Follows vLLM 0.32: `vllm/entrypoints/launchers/run_batch.py` (the line), `chat_completion/serving.py`
  (chat_completion_full_generator) and `completion/serving.py` (request_output_to_completion_response).
- The same results give the same bytes, in any attempt and at any world size: ids are hashes of the run and the row, and
  `created` is when the run began.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dpgen.data.openai_batch.lines import CHAT_URL, COMPLETIONS_URL, EMBEDDINGS_URL, BatchLine, parse_batch_line
from dpgen.data.openai_batch.requests import find_role, get_echo
from dpgen.data.token_texts import TokenTexts
from dpgen.output.column_values import (
    escape_if_any,
    escape_surrogates,
    get_token_ids,
    get_tool_calls,
    to_shortest_decimals,
)
from dpgen.output.openai_batch.errors import build_error, find_http_error
from dpgen.output.openai_batch.logprobs import build_chat_logprobs, build_completion_logprobs, build_prompt_logprobs
from dpgen.records import Completion, RowResult, ServerRequest


class RunFacts(NamedTuple):
    """Hold what the responses of a run share.

    Attributes:
        key: tells this run from others.
        created: when the run began, in seconds since 1970.
        model: the name that responses give the model.
        adapters: the names of the run's LoRA adapters.
        has_parser: True if reasoning or tool calls are taken out of texts.
    """

    key: str
    created: int
    model: str
    adapters: frozenset[str] = frozenset()
    has_parser: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> RunFacts:
        """Return what run.json says of a run."""
        identity = metadata.get("identity") or {}
        digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8)
        output = identity.get("output") or {}
        served = (identity.get("engine") or {}).get("served_model_name")
        names = [served] if isinstance(served, str) else list(served or ())
        return cls(
            key=digest.hexdigest(),
            created=int(metadata.get("created") or 0),
            model=str([*names, identity.get("model", "")][0]),
            adapters=frozenset(identity.get("lora") or ()),
            has_parser=bool(output.get("reasoning") or output.get("tool_parser")),
        )


class ResponseBuilder:
    """Build the responses of a run.

    Args:
        load_texts: returns what gives tokens their text; called once, for the first response with log-probabilities.
    """

    def __init__(self, facts: RunFacts, load_texts: Callable[[], TokenTexts] = TokenTexts) -> None:
        self._facts, self._load_texts = facts, load_texts
        self._loaded_texts: TokenTexts | None = None

    def build(self, text: str, result: RowResult) -> dict[str, Any]:
        """Return the response line to a line of the batch file."""
        line = parse_batch_line(text)
        key = self.make_key(result.row)
        status, body, error = 200, None, None
        if result.error is None and line.body is not None:
            body = self._build_body(line, line.body, result, key)
        elif result.error is not None:
            status, error = find_http_error(result.error).status_code, build_error(result.error)
        response = {"status_code": status, "request_id": f"dpgen-batch-{key}", "body": body}
        return {"id": f"dpgen-{key}", "custom_id": line.custom_id, "response": response, "error": error}

    def make_key(self, row: int) -> str:
        """Return what the ids of a row's response end with."""
        return hashlib.blake2b(f"{self._facts.key}/{row}".encode(), digest_size=8).hexdigest()

    def _find_texts(self, request: Mapping[str, Any]) -> TokenTexts:
        if request.get("return_tokens_as_token_ids"):
            return TokenTexts()
        if self._loaded_texts is None:
            self._loaded_texts = self._load_texts()
        return self._loaded_texts

    def _build_body(self, line: BatchLine, request: Mapping[str, Any], result: RowResult, key: str) -> dict[str, Any]:
        if line.url == EMBEDDINGS_URL:
            return build_embeddings_body(request, result, self._facts, key)
        is_chat, facts = line.url == CHAT_URL, self._facts
        build_choice = self._build_chat_choice if is_chat else self._build_completion_choice
        model = request.get("model")
        prompt = None
        asks_for_prompt = request.get("prompt_logprobs") is not None or bool(request.get("echo"))
        if asks_for_prompt and result.prompt_logprobs is not None:
            prompt = build_prompt_logprobs(result.prompt_logprobs, self._find_texts(request))
        choices = [build_choice(request, index, sample) for index, sample in enumerate(result.completions)]
        if request.get("echo"):
            echo = get_echo(ServerRequest(line.url or COMPLETIONS_URL, dict(request)))
            add_echo = _echo_in_chat if is_chat else partial(self._echo_prompt, request, result)
            choices = [add_echo(echo, choice) for choice in choices]
        body: dict[str, Any] = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{key}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": facts.created,
            "model": model if model in facts.adapters else facts.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": f"dpgen-{facts.key[:8]}",
            "usage": _build_usage(result),
        }
        if is_chat:
            body |= {"prompt_logprobs": prompt, "prompt_token_ids": None, "prompt_text": None}
        else:
            for choice in choices:
                choice["prompt_logprobs"] = prompt
        return body | {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}

    def _build_chat_choice(self, request: Mapping[str, Any], index: int, completion: Completion) -> dict[str, Any]:
        calls = get_tool_calls(completion) if _offers_tools(request) else []
        if request.get("parallel_tool_calls") is False:
            calls = calls[:1]
        hides_reasoning = request.get("include_reasoning") is False
        hides_tokens = hides_reasoning and self._facts.has_parser
        logprobs = None
        if request.get("logprobs") and completion.logprobs is not None and not hides_tokens:
            logprobs = build_chat_logprobs(completion.logprobs, self._find_texts(request), request.get("top_logprobs"))
        message = {
            "role": find_role(request),
            "content": _find_content(request, completion),
            **dict.fromkeys(("refusal", "annotations", "audio", "function_call")),
            **({"tool_calls": [_build_call(call) for call in calls]} if calls else {}),
            "reasoning": None if hides_reasoning else escape_if_any(completion.reasoning),
        }
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": _find_finish_reason(request, completion, has_calls=bool(calls)),
            "stop_reason": completion.stop_reason,
            "token_ids": None if hides_tokens else _find_token_ids(request, completion),
            "routed_experts": None,
        }

    def _build_completion_choice(
        self, request: Mapping[str, Any], index: int, completion: Completion
    ) -> dict[str, Any]:
        k, logprobs = request.get("logprobs"), None
        if k is not None and completion.logprobs is not None:
            logprobs = build_completion_logprobs([completion.logprobs], self._find_texts(request), int(k))
        return {
            "index": index,
            "text": escape_surrogates(completion.text),
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "token_ids": _find_token_ids(request, completion),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }

    def _echo_prompt(
        self, request: Mapping[str, Any], result: RowResult, echo: str, choice: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a choice with the prompt in front of its text, or in its place where no token is asked for."""
        is_alone = request.get("max_tokens") == 0
        k, prompt = request.get("logprobs"), result.prompt_logprobs
        logprobs = choice["logprobs"]
        if k is not None and prompt is not None:
            own = result.completions[choice["index"]].logprobs
            parts = [prompt] if is_alone or own is None else [prompt, own]
            logprobs = build_completion_logprobs(parts, self._find_texts(request), int(k))
        return {**choice, "text": echo if is_alone else echo + choice["text"], "logprobs": logprobs}


def build_embeddings_body(request: Mapping[str, Any], result: RowResult, facts: RunFacts, key: str) -> dict[str, Any]:
    """Return the answer to a request for embeddings: one for each text, as numbers or as base64 of float32."""
    vectors = [] if result.pooled is None else list(result.pooled.values)
    is_base64 = request.get("encoding_format") == "base64"
    values = [b64encode(v.astype("<f4").tobytes()).decode() if is_base64 else _list_decimals(v) for v in vectors]
    model = request.get("model")
    return {
        "id": f"embd-{key}",
        "object": "list",
        "created": facts.created,
        "model": model if model in facts.adapters else facts.model,
        "data": [{"index": index, "object": "embedding", "embedding": value} for index, value in enumerate(values)],
        "usage": _build_usage(result),
    }


def _list_decimals(vector: np.ndarray) -> list[float]:
    """Return the shortest numbers that float32 reads back as the same."""
    decimals = to_shortest_decimals(vector)
    assert decimals is not None
    return [float(value) for value in decimals]


def _echo_in_chat(echo: str, choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    return {**choice, "message": {**message, "content": echo + (message["content"] or "")}}


def format_response_line(response: Mapping[str, Any]) -> str:
    """Return a response as a line of the file: strict JSON, in UTF-8 characters rather than escapes."""
    return json.dumps(response, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _build_usage(result: RowResult) -> dict[str, Any]:
    num_prompt_tokens = result.num_prompt_tokens or 0
    return {
        "prompt_tokens": num_prompt_tokens,
        "total_tokens": num_prompt_tokens + result.num_generated_tokens,
        "completion_tokens": result.num_generated_tokens,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def _build_call(call: Mapping[str, str]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


def _offers_tools(request: Mapping[str, Any]) -> bool:
    return bool(request.get("tools")) and request.get("tool_choice") != "none"


def _find_content(request: Mapping[str, Any], completion: Completion) -> str | None:
    """Return the message's text; None where reasoning or calls are all there is, unless a call was required."""
    requires_call = _offers_tools(request) and request.get("tool_choice") not in (None, "auto")
    is_all = completion.tool_calls or completion.reasoning is not None or completion.has_null_content
    if not completion.text and not requires_call and is_all:
        return None
    return escape_surrogates(completion.text)


def _find_finish_reason(request: Mapping[str, Any], completion: Completion, *, has_calls: bool) -> str:
    choice = request.get("tool_choice")
    if choice == "required" and completion.finish_reason == "stop":
        return "tool_calls"
    if has_calls and choice in (None, "auto"):
        return "tool_calls"
    return completion.finish_reason or "stop"


def _find_token_ids(request: Mapping[str, Any], completion: Completion) -> list[int] | None:
    if not request.get("return_token_ids"):
        return None
    token_ids = get_token_ids(completion)
    return None if token_ids is None else [int(token_id) for token_id in token_ids]
