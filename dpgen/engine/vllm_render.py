"""Prompts → token ids by vLLM's own renderer, for tokenizers that only vLLM knows. In the engine process.

It calls what LLM.generate and LLM.chat call (`vllm/entrypoints/common/offline.py`, in vLLM 0.26
`vllm/entrypoints/offline_utils.py`), with one difference to 0.26: chat prompts of multi-modal models get no
second BOS, as since vllm#55197.
"""

from __future__ import annotations

import copy
from typing import Any

from dpgen.data.chat import Message
from dpgen.data.render import PromptConfig
from dpgen.errors import ConfigError, RowRefused


class VllmRenderer:
    """Renders the prompts that `PromptRenderer.prompt` made.

    Args:
        engine: vLLM's `LLMEngine`, or a renderer of it.
        settings: how rows become prompts.

    Raises:
        ConfigError: a chat without a chat template: no row could be rendered.
    """

    def __init__(self, engine: Any, settings: PromptConfig) -> None:
        self._renderer = getattr(engine, "renderer", engine)
        if settings.is_chat:
            self._chat_params = _chat_params(self._renderer, settings)
            self._require_chat_template()

    def render(self, prompt: str | list[Message]) -> list[int]:
        """The prompt's token ids, at least one.

        Raises:
            RowRefused: `prompt_too_long`, `invalid_text`, `chat_template_failed`, `tokenizer_failed`,
                `empty_prompt`.
        """
        is_text = isinstance(prompt, str)
        try:
            ids = self._text_ids(prompt) if isinstance(prompt, str) else self._chat_ids(prompt)
        except UnicodeEncodeError as error:
            raise RowRefused("invalid_text", str(error)) from error
        except Exception as error:  # foreign code and templates; one bad row costs one row
            reason = str(error) or type(error).__name__
            if getattr(error, "parameter", None) in ("input_text", "input_tokens"):
                raise RowRefused("prompt_too_long", reason) from error
            raise RowRefused("tokenizer_failed" if is_text else "chat_template_failed", reason) from error
        if not ids:
            raise RowRefused("empty_prompt", "the prompt has no tokens")
        return list(ids)

    def _text_ids(self, text: str) -> list[int]:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        text.encode("utf-8")
        prompt = parse_model_prompt(self._renderer.model_config, text)
        (rendered,) = self._renderer.render_cmpl([prompt], self._renderer.default_cmpl_tok_params)
        ids: list[int] = rendered["prompt_token_ids"]
        return ids

    def _chat_ids(self, messages: list[Message]) -> list[int]:
        params = self._renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
        # vLLM parses tool arguments in place.
        conversations = [copy.deepcopy(messages)]
        _, (rendered,) = self._renderer.render_chat(conversations, self._chat_params, params)
        ids: list[int] = rendered["prompt_token_ids"]
        return ids

    def _require_chat_template(self) -> None:
        try:
            self._chat_ids([{"role": "user", "content": "warmup"}])
        except Exception as error:
            # By name: the class has moved between modules. Any other trouble the rows will meet, and report.
            if type(error).__name__ == "ChatTemplateResolutionError":
                raise ConfigError("the tokenizer has no chat template; set data.chat_template") from error


def _chat_params(renderer: Any, settings: PromptConfig) -> Any:
    from vllm.renderers import ChatParams
    from vllm.utils.mistral import is_mistral_tokenizer

    # mistral-common goes from messages to tokens in one step; there is no text between.
    tokenize = is_mistral_tokenizer(renderer.tokenizer) or renderer.model_config.enable_prompt_embeds
    own = {
        "add_generation_prompt": settings.add_generation_prompt,
        "continue_final_message": settings.continue_final_message,
        "tokenize": tokenize,
    }
    kwargs = {**settings.chat_template_kwargs, **own}
    return ChatParams(chat_template=settings.load_chat_template(), chat_template_kwargs=kwargs)
