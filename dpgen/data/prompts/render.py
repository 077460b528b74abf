"""Turn dataset rows into prompt token ids: exactly those that vLLM's LLM.generate or LLM.chat would use.

    config = PromptConfig(messages_column="messages")
    check_prompt_columns(config, dataset.column_names)  # dpgen.data.prompts.columns
    tokenizer = load_tokenizer(TokenizerConfig.from_engine(model, engine))
    PromptRenderer(config, tokenizer).tokenize_row(row)  # [1, 15, ...]

- A text is tokenized as by LLM.generate: with the special tokens that the tokenizer adds.
- Messages become text through the chat template, and that text is tokenized *without* special tokens, as by LLM.chat:
  the template has written them. Adding them again is the classic doubled BOS.
- Follows vLLM 0.32: `vllm/entrypoints/common/offline.py` (_preprocess_cmpl, _preprocess_chat),
  `vllm/renderers/base.py` (_tokenize_prompt), `vllm/renderers/hf.py` (safe_apply_chat_template).
- Limits: text only, decoder-only models. Where `is_supported_by_transformers` is false, only vLLM knows the tokenizer,
  and `dpgen.engine.vllm.vllm_render` renders. A chat template that writes today's date gives other tokens tomorrow.
- A given completion (`data.completion_column`) is tokenized together with its prompt's text, so that its first token is
  the one that the model knows there. Where the text on both sides of the border would become one token, it is
  tokenized alone. Either way the prompt keeps the tokens that it has without a completion. After
  a prompt of token ids it is tokenized alone, too, and after a prefill it continues the assistant's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.chat import ChatPrompt, merge_developer_role, to_conversation, validate_messages
from dpgen.data.prompts.chat_prompt import ChatPromptBuilder
from dpgen.data.prompts.chat_template import ChatTemplates
from dpgen.data.prompts.row_template import compile_row_template, render_row
from dpgen.data.prompts.token_ids import count_token_ids, to_text, validate_token_ids
from dpgen.errors import RowRefused
from dpgen.formatting import describe_type

Prompt = str | list[int] | ChatPrompt


class RenderedPrompt(NamedTuple):
    """Hold a row's prompt.

    Attributes:
        token_ids: the prompt's tokens, and those of a given completion after them; None where the engine tokenizes.
        prompt: the text or the chat messages if `token_ids` is None.
        num_completion_tokens: how many tokens at the end are the given completion; 0 if there is none.
    """

    token_ids: list[int] | None
    prompt: Any = None
    num_completion_tokens: int = 0


RenderFn = Callable[[Mapping[str, Any]], RenderedPrompt]


class PromptRenderer:
    """Turn rows into prompts, and prompts into token ids.

    Args:
        config: how a row becomes a prompt.
        tokenizer: as `load_tokenizer` returns it; None where the engine renders, and only `build_prompt` is called.
        has_added_nulls: True if Arrow may have given objects of a column the keys of other rows' objects, as null.

    Raises:
        ConfigError: a broken template, a chat without a chat template, or a variable that the template doesn't use.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any, *, has_added_nulls: bool = True) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._template = None if config.template is None else compile_row_template(config.template)
        self._num_ids: int | None = None
        if config.token_ids_column is not None and tokenizer is not None:
            self._num_ids = count_token_ids(tokenizer)
        self._chat = ChatPromptBuilder(config, has_added_nulls)
        if config.is_chat and tokenizer is not None:
            self._chat_templates = ChatTemplates(config, tokenizer)

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Return the row's prompt: the text or the token ids for LLM.generate, or the chat for LLM.chat.

        Raises:
            RowRefused: `wrong_type`, `template_failed`, `empty_prompt`, `unsupported_content`, `invalid_text`,
                `out_of_vocabulary`, `bad_template_kwargs`, `bad_tools`.
        """
        config = self._config
        if config.token_ids_column is not None:
            return validate_token_ids(config.token_ids_column, row.get(config.token_ids_column), self._num_ids)
        if config.messages_column is not None:
            messages = validate_messages(row.get(config.messages_column))
        else:
            text = self._build_text(row)
            _reject_surrogates(text)
            if not config.as_chat:
                return text
            messages = [{"role": "user", "content": text}]
        return self._chat.build(messages, row)

    def tokenize_row(self, row: Mapping[str, Any]) -> list[int]:
        """Return the row's prompt as token ids, at least one.

        Raises:
            RowRefused: as `build_prompt`, and `chat_template_failed`, `tokenizer_failed`.
        """
        assert self._tokenizer is not None, "this PromptRenderer was made without a tokenizer"
        prompt = self.build_prompt(row)
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, str):
            return self._tokenize(prompt, add_special_tokens=True)
        return self._tokenize(self._apply_chat_template(prompt), add_special_tokens=False)

    def render(self, row: Mapping[str, Any]) -> RenderedPrompt:
        """Return the row's prompt as token ids, and its given completion if there is one.

        Raises:
            RowRefused: as `tokenize_row`, and `empty_completion`.
        """
        if self._config.completion_column is None:
            return RenderedPrompt(self.tokenize_row(row))
        completion = get_completion(row, self._config.completion_column)
        prompt = self.build_prompt(row)
        if isinstance(prompt, list):
            prompt_ids = both = prompt
        else:
            is_text = isinstance(prompt, str)
            text = prompt if isinstance(prompt, str) else self._apply_chat_template(prompt)
            prompt_ids = self._tokenize(text, add_special_tokens=is_text)
            both = self._tokenize(text + completion, add_special_tokens=is_text)
        if len(both) <= len(prompt_ids) or both[: len(prompt_ids)] != prompt_ids:
            both = prompt_ids + self._tokenize(completion, add_special_tokens=False)
        return RenderedPrompt(both, num_completion_tokens=len(both) - len(prompt_ids))

    def _build_text(self, row: Mapping[str, Any]) -> str:
        if self._template is not None:
            try:
                return render_row(self._template, row)
            except Exception as error:  # a template is a program: it may fail in any way
                raise RowRefused("template_failed", f"the template failed: {_describe_error(error)}") from error
        column = self._config.prompt_column
        assert column is not None
        text = row.get(column)
        if not isinstance(text, str):
            raise RowRefused("wrong_type", f"{column} is {describe_type(text)}, not a string")
        return text

    def _apply_chat_template(self, prompt: ChatPrompt) -> str:
        template = self._chat_templates.select(prompt["template_kwargs"])
        conversation = to_conversation(prompt["messages"], template.content_format)
        conversation = merge_developer_role(conversation, template.text)
        own = {
            "add_generation_prompt": self._config.add_generation_prompt and not prompt["is_continued"],
            "continue_final_message": prompt["is_continued"],
            "return_dict": False,
        }
        keywords = {**prompt["template_kwargs"], **own}
        tools = keywords.pop("tools", None)
        try:
            text = self._tokenizer.apply_chat_template(
                conversation=conversation,
                tools=tools,
                chat_template=template.text,
                tokenize=False,
                **{key: value for key, value in keywords.items() if key in template.accepted_names},
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise RowRefused("chat_template_failed", f"the chat template failed: {_describe_error(error)}") from error
        assert isinstance(text, str)
        _reject_surrogates(text)
        return text

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Exception as error:  # foreign code, perhaps the model's own
            raise RowRefused("tokenizer_failed", f"the tokenizer failed: {_describe_error(error)}") from error
        if not ids:
            raise RowRefused("empty_prompt", "the prompt has no tokens")
        return list(ids)


def get_completion(row: Mapping[str, Any], column: str) -> str:
    """Return the text of `data.completion_column`.

    Raises:
        RowRefused: `wrong_type`, `empty_completion`, `invalid_text`.
    """
    text = row.get(column)
    if not isinstance(text, str):
        raise RowRefused("wrong_type", f"{column} is {describe_type(text)}, not a string")
    if not text:
        raise RowRefused("empty_completion", f"{column} is empty, so there is nothing to score")
    _reject_surrogates(text)
    return text


def make_prompt_text_fn(config: PromptConfig) -> Callable[[Mapping[str, Any]], str]:
    """Return a function from a row to its prompt as one text, without the model's chat template.

    The text serves to compare and measure prompts. A given completion is a part of it, since it takes time as a prompt
    does. The function raises as `PromptRenderer.render` does.
    """
    renderer = PromptRenderer(config, None)

    def make_text(row: Mapping[str, Any]) -> str:
        prompt = renderer.build_prompt(row)
        completion = "" if config.completion_column is None else get_completion(row, config.completion_column)
        if isinstance(prompt, list):
            return to_text(prompt) + completion
        if isinstance(prompt, str):
            return prompt + completion
        messages = "\n".join(f"{message['role']}\n{message['content']}" for message in prompt["messages"])
        return f"{describe_own_kwargs(config, prompt)}{messages}{completion}"

    return make_text


def describe_own_kwargs(config: PromptConfig, prompt: ChatPrompt) -> str:
    """Return a text for the variables of a row's chat template, tools included; "" if they are the run's."""
    of_run = {**config.chat_template_kwargs, **({} if config.tools is None else {"tools": config.tools})}
    own = prompt["template_kwargs"]
    return "" if own == of_run else f"{own}\n"


def _reject_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # as `surrogateescape` reads bytes
            what = f"the byte 0x{code - 0xDC00:02X}, which is not valid UTF-8 there"
        else:
            what = "half of a surrogate pair, which no encoding of text can hold"
        raise RowRefused("invalid_text", f"character {error.start} is {what}") from None


def _describe_error(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip()
