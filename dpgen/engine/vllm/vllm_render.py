"""Tokenize prompts with vLLM's own renderer, for tokenizers that only vLLM knows. Runs in the engine process.

- Calls the functions that LLM.generate and LLM.chat call (`vllm/entrypoints/common/offline.py`, in vLLM 0.26
  `vllm/entrypoints/offline_utils.py`), so the token ids are the same.
- One difference to 0.26: chat prompts of multi-modal models get no second BOS, as since vllm#55197.
"""

from __future__ import annotations

import copy
from typing import Any

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.chat import Message
from dpgen.data.prompts.render import load_chat_template
from dpgen.data.prompts.template_kwargs import check_template_kwargs
from dpgen.errors import ConfigError, RowRefused


class VllmRenderer:
    """Tokenize the prompts that `PromptRenderer.build_prompt` made.

    Args:
        engine: vLLM's `LLMEngine`, or its renderer.
        config: how rows become prompts.

    Raises:
        ConfigError: the prompts are chats and the tokenizer has no chat template, so no row could be rendered; or
            `data.chat_template_kwargs` holds a name that the template doesn't use.
    """

    def __init__(self, engine: Any, config: PromptConfig) -> None:
        self._renderer = getattr(engine, "renderer", engine)
        if config.is_chat:
            self._chat_params = _build_chat_params(self._renderer, config)
            self._require_chat_template()
            _check_template_kwargs(self._renderer, config)

    def render(self, prompt: str | list[Message]) -> list[int]:
        """Return the prompt's token ids, at least one.

        Raises:
            RowRefused: `prompt_too_long`, `invalid_text`, `chat_template_failed`, `tokenizer_failed`,
                `empty_prompt`.
        """
        is_text = isinstance(prompt, str)
        try:
            ids = self._tokenize_text(prompt) if isinstance(prompt, str) else self._tokenize_chat(prompt)
        except UnicodeEncodeError as error:
            raise RowRefused("invalid_text", str(error)) from error
        except Exception as error:  # foreign code and templates: one bad row costs one row
            reason = str(error) or type(error).__name__
            if getattr(error, "parameter", None) in ("input_text", "input_tokens"):
                raise RowRefused("prompt_too_long", reason) from error
            raise RowRefused("tokenizer_failed" if is_text else "chat_template_failed", reason) from error
        if not ids:
            raise RowRefused("empty_prompt", "the prompt has no tokens")
        return list(ids)

    def _tokenize_text(self, text: str) -> list[int]:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        text.encode("utf-8")
        prompt = parse_model_prompt(self._renderer.model_config, text)
        (rendered,) = self._renderer.render_cmpl([prompt], self._renderer.default_cmpl_tok_params)
        ids: list[int] = rendered["prompt_token_ids"]
        return ids

    def _tokenize_chat(self, messages: list[Message]) -> list[int]:
        params = self._renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
        # A copy, because vLLM parses tool arguments in place.
        conversations = [copy.deepcopy(messages)]
        _, (rendered,) = self._renderer.render_chat(conversations, self._chat_params, params)
        ids: list[int] = rendered["prompt_token_ids"]
        return ids

    def _require_chat_template(self) -> None:
        try:
            self._tokenize_chat([{"role": "user", "content": "warmup"}])
        except Exception as error:
            # By name, because the class has moved between modules. Rows meet any other error again, and report it.
            if type(error).__name__ == "ChatTemplateResolutionError":
                raise ConfigError("the tokenizer has no chat template; set data.chat_template") from error


def _check_template_kwargs(renderer: Any, config: PromptConfig) -> None:
    """Check the names that reach the chat template; renderers of other tokenizers have code instead of one."""
    from vllm.renderers.hf import HfRenderer

    template = load_chat_template(config) or getattr(renderer.tokenizer, "chat_template", None)
    if isinstance(renderer, HfRenderer) and isinstance(template, str):
        check_template_kwargs(config.chat_template_kwargs, renderer.tokenizer, template)


def _build_chat_params(renderer: Any, config: PromptConfig) -> Any:
    from vllm.renderers import ChatParams
    from vllm.utils.mistral import is_mistral_tokenizer

    # mistral-common turns messages into tokens in one step, without a text between them.
    tokenize = is_mistral_tokenizer(renderer.tokenizer) or renderer.model_config.enable_prompt_embeds
    own = {
        "add_generation_prompt": config.add_generation_prompt,
        "continue_final_message": config.continue_final_message,
        "tokenize": tokenize,
    }
    kwargs = {**config.chat_template_kwargs, **own}
    return ChatParams(chat_template=load_chat_template(config), chat_template_kwargs=kwargs)
