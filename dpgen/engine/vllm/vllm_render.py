"""Render prompts with vLLM's own renderer: for tokenizers that only vLLM knows in the engine, for media in workers.

For prompts that are token ids, only their vocabulary is found here.

- Calls the functions that LLM.generate and LLM.chat call (`vllm/entrypoints/common/offline.py`, in vLLM 0.26
  `vllm/entrypoints/offline_utils.py`), so the token ids are the same.
- One difference to 0.26: chat prompts of multi-modal models get no second BOS, as since vllm#55197.
"""

from __future__ import annotations

import copy
from typing import Any

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.chat import ChatPrompt
from dpgen.data.prompts.chat_template import ChatTemplates, find_own_template
from dpgen.errors import ConfigError, RowRefused


class VllmRenderer:
    """Tokenize the prompts that `PromptRenderer.build_prompt` made.

    Args:
        engine: vLLM's `LLMEngine`, or its renderer.
        config: how rows become prompts.
        options: further arguments of the renderer's own functions.

    Raises:
        ConfigError: the prompts are chats and the tokenizer has no chat template, so no row could be rendered; or the
            template can't use something that the configuration gives it.
    """

    def __init__(self, engine: Any, config: PromptConfig, **options: Any) -> None:
        self._renderer = getattr(engine, "renderer", engine)
        self._config, self._options = config, options
        if config.may_be_chat:
            self._tokenizes_chats = _tokenizes_chats(self._renderer)
            self._own_template = find_own_template(config, self._renderer.tokenizer)
            if config.is_chat:
                self._require_chat_template()
            self._chat_templates = _find_chat_templates(self._renderer, config)

    def render(self, prompt: str | ChatPrompt) -> list[int]:
        """Return the prompt's token ids, at least one.

        Raises:
            RowRefused: see `render_input`.
        """
        return list(self.render_input(prompt)["prompt_token_ids"])

    def render_input(self, prompt: Any) -> Any:
        """Return vLLM's input for the engine, with at least one token; of a model with an encoder, the decoder's.

        That one holds what the encoder reads, too.

        Args:
            prompt: a text, a `ChatPrompt`, or a dict as LLM.generate takes it. Media are parts as LLM.chat takes them.

        Raises:
            RowRefused: `prompt_too_long`, `invalid_text`, `chat_template_failed`, `tokenizer_failed`,
                `empty_prompt`, `bad_template_kwargs`.
        """
        is_chat = isinstance(prompt, dict) and "messages" in prompt
        if is_chat and self._chat_templates is not None:
            self._chat_templates.select(prompt["template_kwargs"])  # vLLM drops unknown names without a word
        try:
            rendered = self._render_chat(prompt) if is_chat else self._render_text(prompt)
        except UnicodeEncodeError as error:
            raise RowRefused("invalid_text", str(error)) from error
        except Exception as error:  # foreign code and templates: one bad row costs one row
            reason = str(error) or type(error).__name__
            if getattr(error, "parameter", None) in ("input_text", "input_tokens"):
                raise RowRefused("prompt_too_long", reason) from error
            raise RowRefused("chat_template_failed" if is_chat else "tokenizer_failed", reason) from error
        rendered = rendered.get("decoder_prompt", rendered)
        if not len(rendered["prompt_token_ids"]):
            raise RowRefused("empty_prompt", "the prompt has no tokens")
        return rendered

    def _render_text(self, prompt: Any) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        text = prompt if isinstance(prompt, str) else prompt["prompt"]
        text.encode("utf-8")
        parsed = parse_model_prompt(self._renderer.model_config, prompt)
        params = self._renderer.default_cmpl_tok_params
        (rendered,) = self._renderer.render_cmpl([parsed], params, **self._options)
        return rendered

    def _render_chat(self, prompt: ChatPrompt) -> Any:
        from vllm.renderers import ChatParams

        own = {
            "add_generation_prompt": prompt["add_generation_prompt"],
            "continue_final_message": prompt["is_continued"],
            "tokenize": self._tokenizes_chats,
        }
        # A copy, because vLLM parses tool arguments in place.
        copied = copy.deepcopy(prompt)
        chat_params = ChatParams(
            chat_template=self._own_template, chat_template_kwargs={**copied["template_kwargs"], **own}
        )
        params = self._renderer.default_chat_tok_params.with_kwargs(add_special_tokens=prompt["add_special_tokens"])
        _, (rendered,) = self._renderer.render_chat([copied["messages"]], chat_params, params, **self._options)
        return rendered

    def _require_chat_template(self) -> None:
        template_kwargs = dict(self._config.chat_template_kwargs)
        if self._config.tools is not None:
            template_kwargs["tools"] = self._config.tools
        messages = [{"role": "user", "content": "warmup"}]
        try:
            self._render_chat(
                {
                    "messages": messages,
                    "template_kwargs": template_kwargs,
                    "is_continued": False,
                    "add_generation_prompt": self._config.add_generation_prompt,
                    "add_special_tokens": False,
                }
            )
        except Exception as error:
            # By name, because the class has moved between modules. Rows meet any other error again, and report it.
            if type(error).__name__ == "ChatTemplateResolutionError":
                raise ConfigError("the tokenizer has no chat template; set data.chat_template") from error


def count_vocabulary(engine: Any) -> int:
    """Return the number of token ids that prompts may have, counted from 0.

    vLLM itself takes any id where it has no tokenizer, and the model then fails on those beyond its embeddings.
    """
    renderer = getattr(engine, "renderer", engine)
    if renderer.tokenizer is None:
        return int(renderer.model_config.get_vocab_size())
    return int(renderer.tokenizer.max_token_id) + 1


def _find_chat_templates(renderer: Any, config: PromptConfig) -> ChatTemplates | None:
    """Return the chat templates, to check what they are given; None where code or a processor's template renders."""
    from vllm.renderers.hf import HfRenderer

    has_template = config.chat_template is not None or getattr(renderer.tokenizer, "chat_template", None) is not None
    return ChatTemplates(config, renderer.tokenizer) if isinstance(renderer, HfRenderer) and has_template else None


def _tokenizes_chats(renderer: Any) -> bool:
    """Return True if messages become tokens in one step, without a text between them."""
    from vllm.utils.mistral import is_mistral_tokenizer

    return bool(is_mistral_tokenizer(renderer.tokenizer) or renderer.model_config.enable_prompt_embeds)
