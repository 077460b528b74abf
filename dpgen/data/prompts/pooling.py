"""Turn rows into the sequences that a pooling model reads: one text, a pair of texts, or a long text in chunks.

- A text is tokenized as by LLM.embed and LLM.classify, and a pair as by LLM.score: with the special tokens that the
  tokenizer adds. Follows vLLM 0.32: `vllm/entrypoints/pooling/scoring/io_processor.py` (get_score_prompt).
- A cross-encoder reads query and document as one sequence. Of embedding models each is read alone, and compared after.
- A text that exceeds the context is cut between its special tokens, so that each part begins and ends as a whole text
  does. Of a pair the longer text is cut first, as the tokenizer does it.
- Limits: text only. A model's own score template in vLLM's code (JinaVL) is not applied; `data.chat_template` may give
  one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpgen.config.pooling.pooling_config import PoolingConfig
from dpgen.config.prompt import PromptConfig
from dpgen.data.openai_batch.embeddings import EmbeddingsRequest, read_embeddings_request
from dpgen.data.prompts.chat_template import ChatTemplates
from dpgen.data.prompts.render import Prompt, PromptRenderer, RenderedPrompt, reject_media
from dpgen.data.prompts.row_texts import read_pair
from dpgen.errors import RowRefused
from dpgen.records import PoolingRequest

# How a model compares two texts, by vLLM's names.
CROSS_ENCODER, BI_ENCODER, LATE_INTERACTION = "cross-encoder", "bi-encoder", "late-interaction"


@dataclass
class PoolingContext:
    """Hold what the loaded model says of itself; defaults until it is loaded.

    Attributes:
        max_model_len: the most tokens of a sequence; None where not known.
        score_type: vLLM's name of how the model compares two texts.
        uses_separator: True if special tokens stand between the texts of a pair.
    """

    max_model_len: int | None = None
    score_type: str = CROSS_ENCODER
    uses_separator: bool = True


class PooledSequence(NamedTuple):
    """Hold one sequence.

    Attributes:
        token_ids: its tokens.
        second_start: from which token on it is the second text of a pair; -1 where the tokenizer does not say.
        num_cut_tokens: tokens that were cut off.
    """

    token_ids: list[int]
    second_start: int = -1
    num_cut_tokens: int = 0


class PoolingTokenizer:
    """Tokenize texts and pairs with a tokenizer of transformers.

    Args:
        tokenizer: as `load_tokenizer` returns it; its texts are cut at their end from now on.
        renderer: tokenizes prompts.
    """

    def __init__(self, tokenizer: Any, renderer: PromptRenderer) -> None:
        self._tokenizer, self._renderer = tokenizer, renderer
        tokenizer.truncation_side = "right"  # as vLLM sets it for pooling models
        self._num_specials = int(tokenizer.num_special_tokens_to_add(pair=False))

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt, at least one; see `PromptRenderer.tokenize`."""
        return self._renderer.tokenize(prompt)

    def find_specials(self, prompt: Prompt, token_ids: list[int]) -> tuple[int, int]:
        """Return how many special tokens the tokenizer has put in front of a text, and after it."""
        if not isinstance(prompt, str) or not self._num_specials:
            return 0, 0
        own = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        num_added = len(token_ids) - len(own)
        for start in range(num_added + 1):
            if token_ids[start : start + len(own)] == own:
                return start, num_added - start
        return 0, 0

    def tokenize_pair(self, query: str, document: str, *, has_separator: bool, limit: int | None) -> PooledSequence:
        """Return a pair as one sequence, cut to `limit` tokens.

        Raises:
            RowRefused: `tokenizer_failed`.
        """
        texts: dict[str, Any] = {"text": query, "text_pair": document} if has_separator else {"text": query + document}
        try:
            encoded = self._tokenizer(**texts)
            num_tokens = len(encoded["input_ids"])
            if limit is not None and num_tokens > limit:
                encoded = self._tokenizer(**texts, truncation=True, max_length=limit)
        except Exception as error:  # foreign code, perhaps the model's own
            raise RowRefused("tokenizer_failed", f"the tokenizer failed: {error}") from error
        ids, types = list(encoded["input_ids"]), encoded.get("token_type_ids")
        # vLLM takes the place of the first 1, and the sequence's end where there is none.
        second_start = -1 if types is None else next((i for i, type in enumerate(types) if type == 1), len(ids))
        return PooledSequence(ids, second_start, num_tokens - len(ids))


class ByteTokenizer:
    """Do the same for the fake engine, whose tokens are bytes."""

    def __init__(self, tokenize: Callable[[Prompt], list[int]]) -> None:
        self.tokenize = tokenize

    def find_specials(self, prompt: Prompt, token_ids: list[int]) -> tuple[int, int]:
        """Return that there are none."""
        return 0, 0

    def tokenize_pair(self, query: str, document: str, *, has_separator: bool, limit: int | None) -> PooledSequence:
        """Return a pair as one sequence, cut to `limit` tokens."""
        first, second = self.tokenize(query), self.tokenize(document)
        ids = [*first, *second]
        cut = ids if limit is None else ids[:limit]
        return PooledSequence(cut, len(first), len(ids) - len(cut))


class PoolingRenderer:
    """Turn rows into requests for a pooling model.

    Args:
        config: the task, and what becomes of long texts.
        prompt_config: where a row's texts are.
        prompts: makes a row's prompt, where it has one.
        tokenizer: of texts and pairs.
        context: what the loaded model says.
        templates: the score template, if `data.chat_template` gives one for pairs.
    """

    def __init__(
        self,
        config: PoolingConfig,
        prompt_config: PromptConfig,
        prompts: PromptRenderer,
        tokenizer: PoolingTokenizer | ByteTokenizer,
        context: PoolingContext,
        templates: ScoreTemplate | None = None,
    ) -> None:
        self._config, self._prompt_config, self._prompts = config, prompt_config, prompts
        self._tokenizer, self._context, self._template = tokenizer, context, templates

    def render(self, row: Mapping[str, Any]) -> RenderedPrompt:
        """Return a row's sequences.

        Raises:
            RowRefused: as `PromptRenderer.tokenize_row`, and `prompt_too_long`, `bad_request`.
        """
        config = self._prompt_config
        if config.request_column is not None:
            return self.render_request(read_embeddings_request(row.get(config.request_column)))
        if config.is_pair:
            return self.render_pair(*read_pair(row, config))
        return self.render_prompts([self._prompts.build_prompt(row)])

    def render_prompts(self, prompts: Sequence[Prompt]) -> RenderedPrompt:
        """Return the request for a vector of each prompt: texts, token ids or chats.

        Raises:
            RowRefused: as `render`.
        """
        parts = [self._cut(prompt) for prompt in prompts]
        return self._join([(text, part) for text, found in enumerate(parts) for part in found])

    def render_pair(self, query: str, documents: Sequence[str]) -> RenderedPrompt:
        """Return the request for a score of each document, or for the classes of a pair.

        Raises:
            RowRefused: as `render`.
        """
        if self._config.task == "score" and self._context.score_type != CROSS_ENCODER:
            parts = [self._cut(text) for text in (query, *documents)]
            sequences = [(text, part) for text, found in enumerate(parts) for part in found]
            return self._join(sequences, has_query=True)
        return self._join(list(enumerate(self._join_texts(query, document) for document in documents)))

    def render_request(self, request: EmbeddingsRequest) -> RenderedPrompt:
        """Return the request of a line of a batch file."""
        for prompt in request.prompts:
            if isinstance(prompt, list):
                self._prompts.check_token_ids("'input'", prompt)
        rendered = self.render_prompts(request.prompts)
        assert rendered.pooling is not None
        own = {"dimensions": request.dimensions, "normalize": request.normalize}
        given = {name: value for name, value in own.items() if value is not None}
        pooling = dataclasses.replace(rendered.pooling, **given)  # type: ignore[arg-type]
        return rendered._replace(pooling=pooling, server_request=request.source)

    def _join_texts(self, query: str, document: str) -> PooledSequence:
        limit = self._context.max_model_len
        cut_to = limit if self._config.too_long == "truncate" else None
        if self._template is None:
            has_separator = self._context.uses_separator
            sequence = self._tokenizer.tokenize_pair(query, document, has_separator=has_separator, limit=cut_to)
            self._reject_empty(sequence.token_ids)
        else:
            [sequence] = self._cut(self._template.render(query, document))
        if limit is not None:
            self._reject_too_long(len(sequence.token_ids), limit)
        return sequence

    def _cut(self, prompt: Prompt) -> list[PooledSequence]:
        """Return the sequences that a prompt is read in."""
        ids, limit = self._tokenizer.tokenize(prompt), self._context.max_model_len
        self._reject_empty(ids)
        if limit is None or len(ids) <= limit:
            return [PooledSequence(ids)]
        if self._config.too_long == "error":
            self._reject_too_long(len(ids), limit)
        num_before, num_after = self._tokenizer.find_specials(prompt, ids)
        end = len(ids) - num_after
        before, after, own = ids[:num_before], ids[end:], ids[num_before:end]
        room = limit - num_before - num_after
        if room < 1:
            self._reject_too_long(len(ids), limit)
        if self._config.too_long == "truncate":
            return [PooledSequence([*before, *own[:room], *after], num_cut_tokens=len(own) - room)]
        return [PooledSequence([*before, *own[start : start + room], *after]) for start in range(0, len(own), room)]

    def _join(self, parts: list[tuple[int, PooledSequence]], *, has_query: bool = False) -> RenderedPrompt:
        """Return a row's request.

        Args:
            parts: each sequence with the number of its text.
        """
        config, sequences = self._config, [part for _, part in parts]
        texts = tuple(text for text, _ in parts)
        pooling = PoolingRequest(
            config.task,
            lengths=() if len(sequences) == 1 else tuple(len(part.token_ids) for part in sequences),
            texts=() if texts == tuple(range(len(texts))) else texts,
            second_starts=tuple(part.second_start for part in sequences) if self._has_types(sequences) else (),
            has_query=has_query,
            num_cut_tokens=sum(part.num_cut_tokens for part in sequences),
            dimensions=config.dimensions,
            normalize=config.normalize,
            is_per_token=config.reward_per == "token",
        )
        token_ids = sequences[0].token_ids if len(sequences) == 1 else [i for part in sequences for i in part.token_ids]
        return RenderedPrompt(token_ids, pooling=pooling)

    @staticmethod
    def _has_types(sequences: Sequence[PooledSequence]) -> bool:
        return any(part.second_start >= 0 for part in sequences)

    @staticmethod
    def _reject_empty(token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise RowRefused("empty_prompt", "the prompt has no tokens")

    @staticmethod
    def _reject_too_long(num_tokens: int, limit: int) -> None:
        if num_tokens > limit:
            raise RowRefused(
                "prompt_too_long",
                f"the text has {num_tokens} tokens, max_model_len={limit}; data.too_long=truncate reads its beginning",
            )


class ScoreTemplate:
    """Make one text of a pair with a chat template that has the roles query and document, as LLM.score does.

    Args:
        config: `chat_template` and its variables.
        tokenizer: of transformers.

    Raises:
        ConfigError: the template is broken, or does not use a variable.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._template = ChatTemplates(config, tokenizer).select(config.chat_template_kwargs)

    def render(self, query: str, document: str) -> str:
        """Return the text.

        Raises:
            RowRefused: `chat_template_failed`.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                conversation=[{"role": "query", "content": query}, {"role": "document", "content": document}],
                tools=None,
                chat_template=self._template.text,
                tokenize=False,
                **self._config.chat_template_kwargs,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise RowRefused("chat_template_failed", f"the chat template failed: {error}") from error
        return str(text)


def wrap_untokenized(rendered: RenderedPrompt, config: PoolingConfig) -> RenderedPrompt:
    """Return a prompt that the engine tokenizes as a request for a pooling model.

    Raises:
        RowRefused: `unsupported_content`, it has media.
    """
    if rendered.token_ids is None:
        reject_media(rendered.prompt)
    pooling = PoolingRequest(
        config.task,
        dimensions=config.dimensions,
        normalize=config.normalize,
        is_per_token=config.reward_per == "token",
    )
    return rendered._replace(pooling=pooling)
