"""Turn dataset rows into prompt token ids: exactly those that vLLM's LLM.generate or LLM.chat would use.

    config = PromptConfig(messages_column="messages")
    check_prompt_columns(config, dataset.column_names)
    tokenizer = load_tokenizer(TokenizerConfig.from_engine(model, engine))
    PromptRenderer(config, tokenizer).tokenize_row(row)  # [1, 15, ...]

- A text is tokenized as by LLM.generate: with the special tokens that the tokenizer adds.
- Messages become text through the chat template, and that text is tokenized *without* special tokens, as by LLM.chat:
  the template has written them. Adding them again is the classic doubled BOS.
- Follows vLLM 0.32: `vllm/entrypoints/common/offline.py` (_preprocess_cmpl, _preprocess_chat),
  `vllm/renderers/base.py` (_tokenize_prompt), `vllm/renderers/hf.py` (safe_apply_chat_template).
- Limits: text only, decoder-only models. Where `is_supported_by_transformers` is false, only vLLM knows the tokenizer,
  and `dpgen.engine.vllm.vllm_render` renders. A chat template that writes today's date gives other tokens tomorrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpgen.config.prompt import PromptConfig
from dpgen.data.prompts.chat import Message, merge_developer_role, to_conversation, validate_messages
from dpgen.data.prompts.content_format import detect_content_format, template_variables
from dpgen.data.prompts.row_template import check_row_template, compile_row_template, render_row, template_columns
from dpgen.data.prompts.template_kwargs import check_template_kwargs, find_accepted_names
from dpgen.errors import ConfigError, RowRefused, suggest_name
from dpgen.formatting import describe_type

RenderFn = Callable[[Mapping[str, Any]], tuple[list[int] | None, Any]]


def check_prompt_columns(config: PromptConfig, columns: Sequence[str]) -> None:
    """Check that the dataset has the columns that prompts are made of, before anything is loaded.

    Raises:
        ConfigError: a missing column, or a template that is broken or names no column.
    """
    if config.template is not None:
        check_row_template(config.template, columns)
        return
    key = "prompt_column" if config.prompt_column is not None else "messages_column"
    name = getattr(config, key)
    if name not in columns:
        raise ConfigError(f"data.{key}: {name!r} is no column of the dataset{suggest_name(name, columns, 'columns')}")


def select_prompt_columns(config: PromptConfig, columns: Sequence[str]) -> list[str]:
    """Return the dataset's columns that a prompt is made of."""
    if config.template is not None:
        return template_columns(config.template, columns)
    return [name for name in (config.prompt_column, config.messages_column) if name is not None]


def load_chat_template(config: PromptConfig) -> str | None:
    """Return the text of `data.chat_template`, read from its file if it names one (`load_chat_template` of vLLM).

    Raises:
        ConfigError: it looks like a path, but can't be read.
    """
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if any(sign in config.chat_template for sign in "{}\n"):
            return config.chat_template
        raise ConfigError(f"data.chat_template={config.chat_template} can't be read: {error}") from None


class PromptRenderer:
    """Turn rows into prompts, and prompts into token ids.

    Args:
        config: how a row becomes a prompt.
        tokenizer: as `load_tokenizer` returns it; None where the engine renders, and only `build_prompt` is called.

    Raises:
        ConfigError: a broken template, a chat without a chat template, or a variable that the template doesn't use.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._template = None if config.template is None else compile_row_template(config.template)
        if config.is_chat and tokenizer is not None:
            self._tools = config.chat_template_kwargs.get("tools")
            own_template = load_chat_template(config)
            self._chat_template = _resolve_chat_template(tokenizer, own_template, self._tools)
            check_template_kwargs(config.chat_template_kwargs, tokenizer, self._chat_template)
            self._content_format = detect_content_format(self._chat_template)
            self._chat_kwargs = _select_template_kwargs(config, tokenizer, self._chat_template)

    def build_prompt(self, row: Mapping[str, Any]) -> str | list[Message]:
        """Return the row's prompt: the text for LLM.generate, or the messages for LLM.chat.

        Raises:
            RowRefused: `wrong_type`, `template_failed`, `empty_prompt`, `unsupported_content`, `invalid_text`.
        """
        config = self._config
        if config.messages_column is not None:
            messages = validate_messages(row.get(config.messages_column))
        else:
            text = self._build_text(row)
            _reject_surrogates(text)
            if not config.as_chat:
                return text
            messages = [{"role": "user", "content": text}]
        if config.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        return messages

    def tokenize_row(self, row: Mapping[str, Any]) -> list[int]:
        """Return the row's prompt as token ids, at least one.

        Raises:
            RowRefused: as `build_prompt`, and `chat_template_failed`, `tokenizer_failed`.
        """
        assert self._tokenizer is not None, "this PromptRenderer was made without a tokenizer"
        prompt = self.build_prompt(row)
        if isinstance(prompt, str):
            return self._tokenize(prompt, add_special_tokens=True)
        return self._tokenize(self._apply_chat_template(prompt), add_special_tokens=False)

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

    def _apply_chat_template(self, messages: list[Message]) -> str:
        conversation = to_conversation(messages, self._content_format)
        conversation = merge_developer_role(conversation, self._chat_template)
        try:
            text = self._tokenizer.apply_chat_template(
                conversation=conversation,
                tools=self._tools,
                chat_template=self._chat_template,
                tokenize=False,
                **self._chat_kwargs,
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


def make_prompt_text_fn(config: PromptConfig) -> Callable[[Mapping[str, Any]], str]:
    """Return a function from a row to its prompt as one text, without the model's chat template.

    The text serves to compare and measure prompts. The function raises as `PromptRenderer.build_prompt` does.
    """
    renderer = PromptRenderer(config, None)

    def make_text(row: Mapping[str, Any]) -> str:
        prompt = renderer.build_prompt(row)
        if isinstance(prompt, str):
            return prompt
        return "\n".join(f"{message['role']}\n{message['content']}" for message in prompt)

    return make_text


def _resolve_chat_template(tokenizer: Any, own_template: str | None, tools: Any) -> str:
    """Return `data.chat_template` or else the tokenizer's (`resolve_chat_template` of vLLM)."""
    try:
        template = str(tokenizer.get_chat_template(own_template, tools=tools))
    except (ValueError, AttributeError) as error:
        reason = f"the tokenizer has no chat template; set data.chat_template ({_describe_error(error)})"
        raise ConfigError(reason) from error
    _check_syntax(template)
    return template


def _check_syntax(template: str) -> None:
    import jinja2

    try:
        template_variables(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"data.chat_template, line {error.lineno}: {error.message}") from error


def check_chat_without_tokenizer(config: PromptConfig, model: str) -> str | None:
    """Check `data.chat_template` and its variables where no tokenizer is loaded; return a note if they can't be.

    Args:
        model: the model's folder, whose own chat template counts if there is no other; or any name.

    Raises:
        ConfigError: as `PromptRenderer`.
    """
    template = load_chat_template(config) or _read_chat_template(Path(model).expanduser())
    if template is not None:
        _check_syntax(template)
        if config.chat_template_kwargs:
            check_template_kwargs(config.chat_template_kwargs, None, template)
        return None
    return "data.chat_template_kwargs is not checked without a chat template" if config.chat_template_kwargs else None


def _read_chat_template(folder: Path) -> str | None:
    """Return the chat template in a model's folder; None if there is none, or several."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    try:
        template = json.loads((folder / "tokenizer_config.json").read_bytes())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None


def _select_template_kwargs(config: PromptConfig, tokenizer: Any, template: str) -> dict[str, Any]:
    """Return the keywords that reach the template."""
    own = {
        "add_generation_prompt": config.add_generation_prompt,
        "continue_final_message": config.continue_final_message,
        "return_dict": False,
    }
    accepted = find_accepted_names(tokenizer, template)
    wanted = {**config.chat_template_kwargs, **own}
    return {key: value for key, value in wanted.items() if key in accepted and key != "tools"}


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
