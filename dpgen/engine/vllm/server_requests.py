"""Turn requests of a batch file into vLLM's sampling parameters, with the classes of vLLM's own server.

- Follows vLLM 0.32: `create_chat_completion` and `create_completion` in `vllm/entrypoints/openai`, and `render_chat` in
  `vllm/renderers/online_renderer.py`.
- A body comes over the run's `sampling`, and that over the model's generation config.
- Requests that only change when an answer comes (`priority`, `cache_salt`, ...) change nothing here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.sampling_params import SamplingParams

from dpgen.data.openai_batch.lines import BAD_REQUEST, CHAT_URL, UNSUPPORTED_REQUEST
from dpgen.data.openai_batch.requests import lay_retry_over
from dpgen.engine.parsing.request_parsers import ParserMaker
from dpgen.engine.vllm.reasoning import ReasoningState, find_state
from dpgen.engine.vllm.rejections import summarize_error
from dpgen.errors import RowRefused
from dpgen.records import Request

_LENGTH_PARAMETERS = ("input_text", "input_tokens")  # that vLLM names where a prompt is too long


class ConvertedRequest(NamedTuple):
    """Hold what vLLM's engine is asked for.

    Attributes:
        params: how to sample.
        token_ids: the prompt, which the request may have cut.
        reasoning: the state of the reasoning where the answer begins; None where the engine finds it itself.
    """

    params: SamplingParams
    token_ids: list[int]
    reasoning: ReasoningState | None = None


class RequestConverter:
    """Convert requests for one model.

    Args:
        model_config: vLLM's `ModelConfig`.
        tokenizer: vLLM's, of the model; None where there is none.
        sampling: the run's fields of SamplingParams.
        retry_names: the fields that `check.retry_sampling` sets.
        parsers: makes the run's parsers of completions; None without them.
    """

    def __init__(
        self,
        model_config: Any,
        tokenizer: Any,
        sampling: Mapping[str, Any],
        retry_names: Collection[str] = (),
        parsers: ParserMaker | None = None,
    ) -> None:
        self._model, self._tokenizer, self._sampling = model_config, tokenizer, sampling
        self._retry_names = retry_names
        self._parsers = parsers
        self._defaults = model_config.get_diff_sampling_param()
        if model_config.generation_config not in ("auto", "vllm"):
            self._max_tokens_limit = self._defaults.get("max_tokens")
        else:
            self._max_tokens_limit = model_config.override_generation_config.get("max_new_tokens")

    def convert(self, request: Request, token_ids: list[int]) -> ConvertedRequest:
        """Return what vLLM's server would ask its engine for.

        Raises:
            RowRefused: `bad_request`, `prompt_too_long`.
        """
        try:
            return self._convert(request, token_ids)
        except RowRefused:
            raise
        except Exception as error:  # noqa: BLE001 - vLLM's errors have no common base: one bad row costs one row
            is_too_long = getattr(error, "parameter", None) in _LENGTH_PARAMETERS
            is_too_long = is_too_long or len(token_ids) >= self._model.max_model_len
            raise RowRefused("prompt_too_long" if is_too_long else BAD_REQUEST, summarize_error(error)) from None

    def _convert(self, request: Request, token_ids: list[int]) -> ConvertedRequest:
        source = request.server_request
        assert source is not None
        is_chat = source.url == CHAT_URL
        own_class = ChatCompletionRequest if is_chat else CompletionRequest
        defaults = {**self._sampling, **request.sampling}
        body: dict[str, Any] = {**source.body, **({"messages": []} if is_chat else {"prompt": "-"})}
        for name, value in _to_body_fields(defaults, is_chat=is_chat).items():
            if body.get(name) is None and name in own_class.model_fields:
                body[name] = value
        body = lay_retry_over(request, body, self._retry_names)
        parsed: Any = own_class.model_validate(body)
        limit = parsed.max_tokens
        if is_chat:
            parsed = self._adjust(parsed)
            limit = parsed.max_tokens if parsed.max_completion_tokens is None else parsed.max_completion_tokens
        prompt: Any = {"prompt_token_ids": token_ids}
        parsed.build_tok_params(self._model).apply_post_tokenization(self._tokenizer, prompt)
        if request.media is not None and len(prompt["prompt_token_ids"]) < len(token_ids):
            reason = "'truncate_prompt_tokens' would cut a prompt with images, audio or video"
            raise RowRefused(UNSUPPORTED_REQUEST, reason)
        token_ids = prompt["prompt_token_ids"]
        max_tokens = get_max_tokens(
            self._model.max_model_len,
            limit,
            len(token_ids),
            self._defaults,
            self._max_tokens_limit,
            truncate_prompt_tokens=parsed.truncate_prompt_tokens,
        )
        params = parsed.to_sampling_params(max_tokens, self._defaults)
        for name, value in defaults.items():
            if name not in own_class.model_fields and name != "logprobs":
                setattr(params, name, value)  # that only SamplingParams has
        is_constrained = is_chat and params.structured_outputs is not None
        reasoning = find_state(parsed, self._parsers, token_ids) if is_constrained else None
        return ConvertedRequest(params, token_ids, reasoning)

    def _adjust(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        """Return a chat as the run's parsers need it: with a grammar for the calls that it demands.

        Raises:
            RowRefused: `bad_request`, it offers tools and nothing reads calls.
        """
        choice = request.tool_choice
        if choice not in (None, "none") and (self._parsers is None or not self._parsers.reads_calls):
            name = repr(choice) if isinstance(choice, str) else "a function"
            raise RowRefused(BAD_REQUEST, f"'tool_choice' is {name}, which needs output.tool_parser")
        if self._parsers is None or not self._parsers.adjusts(request):
            return request
        adjusted: ChatCompletionRequest = self._parsers.make(request).adjust_request(request=request)
        return adjusted


def _to_body_fields(sampling: Mapping[str, Any], *, is_chat: bool) -> dict[str, Any]:
    """Return fields of SamplingParams as a body has them: a chat spells its log-probabilities in two fields."""
    fields = dict(sampling)
    if is_chat and (count := fields.pop("logprobs", None)) is not None:
        fields |= {"logprobs": True, "top_logprobs": count}
    return fields
