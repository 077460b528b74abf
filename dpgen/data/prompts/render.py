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
- A prompt with images, audio or video is not tokenized here: workers load and render it, with vLLM's own code.
- Limits: decoder-only models. Where `is_supported_by_transformers` is false, only vLLM knows the tokenizer,
  and `dpgen.engine.vllm.vllm_render` renders. A chat template that writes today's date gives other tokens tomorrow.
- A given completion (`data.completion_column`) is tokenized together with its prompt's text, so that its first token is
  the one that the model knows there. Where the text on both sides of the border would become one token, it is
  tokenized alone. Either way the prompt keeps the tokens that it has without a completion. After
  a prompt of token ids it is tokenized alone, too, and after a prefill it continues the assistant's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpgen.config.prompt import RESERVED_KWARGS, PromptConfig
from dpgen.config.tools import parse_tools
from dpgen.data.media.columns import put_media_into_chat, read_media_columns
from dpgen.data.media.parts import MediaText, find_media
from dpgen.data.openai_batch.embeddings import find_embeddings_text
from dpgen.data.openai_batch.requests import (
    adds_special_tokens,
    build_request_prompt,
    drop_prompt,
    get_cut_length,
    read_server_request,
)
from dpgen.data.prompts.chat import ChatPrompt, merge_developer_role, to_conversation, validate_messages
from dpgen.data.prompts.chat_prompt import ChatPromptBuilder
from dpgen.data.prompts.chat_template import ChatTemplates
from dpgen.data.prompts.row_template import compile_row_template
from dpgen.data.prompts.row_texts import find_completion, get_completion, read_pair, reject_surrogates
from dpgen.data.prompts.token_ids import count_token_ids, to_text, validate_token_ids
from dpgen.data.tokenizer import make_encoder
from dpgen.errors import ConfigError, RowRefused
from dpgen.formatting import describe_type
from dpgen.programs.handle import ModelCall
from dpgen.records import PoolingRequest, ServerRequest

Prompt = str | list[int] | ChatPrompt | MediaText


class RenderedPrompt(NamedTuple):
    """Hold a row's prompt.

    Attributes:
        token_ids: the prompt's tokens, and those of a given completion after them; None where the engine tokenizes.
        prompt: the text, the chat, or the text with media, if `token_ids` is None.
        num_completion_tokens: how many tokens at the end are the given completion; 0 if there is none.
        server_request: the request that the prompt is a part of, without the prompt; None if the row is no request.
        pooling: what is asked of a pooling model; None to generate text.
    """

    token_ids: list[int] | None
    prompt: Any = None
    num_completion_tokens: int = 0
    server_request: ServerRequest | None = None
    pooling: PoolingRequest | None = None


RenderFn = Callable[[Mapping[str, Any]], RenderedPrompt]


class PromptRenderer:
    """Turn rows into prompts, and prompts into token ids.

    Args:
        config: how a row becomes a prompt.
        tokenizer: as `load_tokenizer` returns it; None where the engine renders, and only `build_prompt` is called.
        has_added_nulls: True if Arrow may have given objects of a column the keys of other rows' objects, as null.
        fills_media: False to leave placeholders of media as they are.

    Raises:
        ConfigError: a broken template, a chat without a chat template, or a variable that the template doesn't use.
    """

    def __init__(
        self, config: PromptConfig, tokenizer: Any, *, has_added_nulls: bool = True, fills_media: bool = True
    ) -> None:
        self._config = config
        self._tokenizer, self._fills_media = tokenizer, fills_media
        self._encode = None if tokenizer is None else make_encoder(tokenizer)
        self._template = None if config.template is None else compile_row_template(config.template)
        self._num_ids: int | None = None
        may_hold_ids = config.token_ids_column is not None or not config.is_of_rows
        if may_hold_ids and tokenizer is not None:
            self._num_ids = count_token_ids(tokenizer)
        self._chat = ChatPromptBuilder(config, has_added_nulls)
        self._chat_templates: ChatTemplates | None = None
        if config.is_chat and tokenizer is not None:
            self._chat_templates = ChatTemplates(config, tokenizer)

    def build_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Return the row's prompt: the text, with media if it has any, or the token ids for LLM.generate, or the chat.

        Raises:
            RowRefused: `wrong_type`, `template_failed`, `empty_prompt`, `unsupported_content`, `invalid_text`,
                `out_of_vocabulary`, `bad_template_kwargs`, `bad_tools`, `media_mismatch`.
        """
        return self._put_media(self._build_plain_prompt(row), row)

    def _build_plain_prompt(self, row: Mapping[str, Any]) -> Prompt:
        config = self._config
        if config.request_column is not None:
            return self._build_request_prompt(row.get(config.request_column))
        if config.call_column is not None:
            return self._build_call_prompt(row[config.call_column])
        if config.token_ids_column is not None:
            return validate_token_ids(config.token_ids_column, row.get(config.token_ids_column), self._num_ids)
        if config.messages_column is not None:
            messages = validate_messages(row.get(config.messages_column))
        else:
            text = self._build_text(row)
            reject_surrogates(text)
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
        return self.tokenize(self.build_prompt(row))

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Return a prompt of `build_prompt` as token ids, at least one.

        Raises:
            RowRefused: `chat_template_failed`, `tokenizer_failed`, `empty_prompt`; `unsupported_content`, it has media.
        """
        reject_media(prompt)
        assert not isinstance(prompt, MediaText), "a text without media is a str"
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, str):
            return self._tokenize(prompt, add_special_tokens=True)
        return self._tokenize(self._apply_chat_template(prompt), prompt["add_special_tokens"])

    def check_token_ids(self, name: str, token_ids: Any) -> None:
        """Raise RowRefused if a prompt holds ids that the vocabulary lacks.

        Args:
            name: of the prompt, for the message.
        """
        validate_token_ids(name, token_ids, self._num_ids)

    def render(self, row: Mapping[str, Any]) -> RenderedPrompt:
        """Return the row's prompt as token ids, and its given completion if there is one.

        Raises:
            RowRefused: as `tokenize_row`, and `empty_completion`.
        """
        completion = find_completion(row, self._config)
        prompt = self.build_prompt(row)
        media = find_media(prompt)
        if completion is None:
            return RenderedPrompt(None, prompt) if media else RenderedPrompt(self.tokenize(prompt))
        if media:
            raise RowRefused("unsupported_content", f"{media[0].where}: text after {media[0].kind} can't be scored")
        assert not isinstance(prompt, MediaText), "a text without media is a str"
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

    def render_untokenized(self, row: Mapping[str, Any]) -> RenderedPrompt:
        """Return the row's prompt as what the engine tokenizes, or as its token ids.

        Raises:
            RowRefused: as `build_prompt`, and `unsupported_request`: a program's call gives a completion to score, and
                that is tokenized here.
        """
        if find_completion(row, self._config) is not None:
            raise RowRefused("unsupported_request", "llm.score needs a tokenizer that transformers can load")
        prompt = self.build_prompt(row)
        return RenderedPrompt(prompt) if isinstance(prompt, list) else RenderedPrompt(None, prompt)

    def _put_media(self, prompt: Prompt, row: Mapping[str, Any]) -> Prompt:
        if not self._fills_media or isinstance(prompt, list):
            return prompt
        media = read_media_columns(row, self._config)
        if isinstance(prompt, str):
            found = tuple(medium for media_of_kind in media.values() for medium in media_of_kind)
            return MediaText(prompt, found) if found else prompt
        if isinstance(prompt, dict):
            put_media_into_chat(prompt["messages"], media, self._config)
        return prompt

    def _build_request_prompt(self, line: Any) -> Prompt:
        request = read_server_request(line)
        prompt = build_request_prompt(request, self._config)
        if isinstance(prompt, list):
            return validate_token_ids("'prompt'", prompt, self._num_ids)
        if isinstance(prompt, str):
            reject_surrogates(prompt)
            adds_specials, limit = adds_special_tokens(request), get_cut_length(request)
            if self._tokenizer is not None and not (adds_specials and limit is None):
                return self._tokenize(prompt, adds_specials, limit)
        return prompt

    def _build_call_prompt(self, call: ModelCall) -> Prompt:
        if isinstance(call.prompt, str):
            reject_surrogates(call.prompt)
            return call.prompt
        if not call.is_chat:
            return validate_token_ids("the prompt", call.prompt, self._num_ids)
        chat = self._chat.build(validate_messages(call.prompt), {})
        own = call.template.get("kwargs", {})
        if forbidden := sorted(own.keys() & RESERVED_KWARGS):
            raise RowRefused("bad_template_kwargs", f"template_kwargs may not hold {forbidden[0]}")
        chat["template_kwargs"] = {**chat["template_kwargs"], **own}
        if "tools" in call.template:
            try:
                chat["template_kwargs"]["tools"] = parse_tools(call.template["tools"]) or None
            except ValueError as error:
                raise RowRefused("bad_tools", f"tools: {error}") from None
        if call.template.get("is_continued"):
            chat["is_continued"], chat["add_generation_prompt"] = True, False
        return chat

    def _get_chat_templates(self) -> ChatTemplates:
        """Return the chat templates; a batch file may hold no chat, so that nobody has asked for them before.

        Raises:
            RowRefused: `chat_template_failed`, there is none.
        """
        if self._chat_templates is None:
            try:
                self._chat_templates = ChatTemplates(self._config, self._tokenizer)
            except ConfigError as error:
                raise RowRefused("chat_template_failed", str(error)) from error
        return self._chat_templates

    def _build_text(self, row: Mapping[str, Any]) -> str:
        if self._template is not None:
            try:
                return self._template.render(row)
            except Exception as error:  # a template is a program: it may fail in any way
                raise RowRefused("template_failed", f"the template failed: {_describe_error(error)}") from error
        column = self._config.prompt_column
        assert column is not None
        text = row.get(column)
        if not isinstance(text, str):
            raise RowRefused("wrong_type", f"{column} is {describe_type(text)}, not a string")
        return text

    def _apply_chat_template(self, prompt: ChatPrompt) -> str:
        template = self._get_chat_templates().select(prompt["template_kwargs"])
        conversation = to_conversation(prompt["messages"], template.content_format)
        conversation = merge_developer_role(conversation, template.text)
        own = {
            "add_generation_prompt": prompt["add_generation_prompt"],
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
        reject_surrogates(text)
        return text

    def _tokenize(self, text: str, add_special_tokens: bool, limit: int | None = None) -> list[int]:
        """Return the tokens of a text, cut to `limit` as the tokenizer does it, which keeps its special tokens."""
        assert self._encode is not None
        cut = {"truncation": True, "max_length": limit, "add_special_tokens": add_special_tokens}
        try:
            ids = self._encode(text, add_special_tokens) if limit is None else self._tokenizer(text, **cut)["input_ids"]
        except Exception as error:  # foreign code, perhaps the model's own
            raise RowRefused("tokenizer_failed", f"the tokenizer failed: {_describe_error(error)}") from error
        if not ids:
            raise RowRefused("empty_prompt", "the prompt has no tokens")
        return list(ids)


def add_server_requests(render: RenderFn, config: PromptConfig) -> RenderFn:
    """Return a function that renders as `render` does, and adds the row's request where rows are requests."""
    column = config.request_column
    if column is None:
        return render

    def render_request(row: Mapping[str, Any]) -> RenderedPrompt:
        rendered = render(row)
        return rendered._replace(server_request=drop_prompt(read_server_request(row[column])))

    return render_request


def make_prompt_text_fn(config: PromptConfig) -> Callable[[Mapping[str, Any]], str]:
    """Return a function from a row to its prompt as one text, without the model's chat template.

    The text serves to compare and measure prompts. A given completion is a part of it, since it takes time as a prompt
    does. The function raises as `PromptRenderer.render` does.
    """
    renderer = PromptRenderer(config.without_media, None, fills_media=False)

    def make_text(row: Mapping[str, Any]) -> str:
        if config.is_pair:
            query, documents = read_pair(row, config)
            return "\n".join([query, *documents])
        if config.request_column is not None and (text := find_embeddings_text(row.get(config.request_column))):
            return text
        prompt = renderer.build_prompt(row)
        completion = "" if config.completion_column is None else get_completion(row, config.completion_column)
        if isinstance(prompt, list):
            return to_text(prompt) + completion
        if isinstance(prompt, str):
            return prompt + completion
        assert not isinstance(prompt, MediaText), "columns with media are not read"
        messages = "\n".join(f"{message['role']}\n{message.get('content', '')}" for message in prompt["messages"])
        return f"{describe_own_kwargs(config, prompt)}{messages}{completion}"

    return make_text


def reject_media(prompt: Prompt) -> None:
    """Raise RowRefused (`unsupported_content`) if a prompt that has to be text has media."""
    if media := find_media(prompt):
        raise RowRefused("unsupported_content", f"{media[0].where}: {media[0].kind} needs task=generate")


def describe_own_kwargs(config: PromptConfig, prompt: ChatPrompt) -> str:
    """Return a text for the variables of a row's chat template, tools included; "" if they are the run's."""
    of_run = {**config.chat_template_kwargs, **({} if config.tools is None else {"tools": config.tools})}
    own = prompt["template_kwargs"]
    return "" if own == of_run else f"{own}\n"


def _describe_error(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip()
