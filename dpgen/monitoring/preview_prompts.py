"""Show a row's prompt as the model will see it: its tokens as text, special tokens apart, and its sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from dpgen.config.schema import Config
from dpgen.data.media.looking import look_at
from dpgen.data.media.parts import find_media
from dpgen.data.media.policy import MediaPolicy
from dpgen.errors import RowRefused
from dpgen.monitoring.preview_rows import RowExaminer, count_prompt_tokens, format_untokenized, get_own_sampling
from dpgen.records import Request

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class PromptPiece:
    """Hold a part of a prompt.

    Attributes:
        kind: "text", "special" (one special token), or "completion" (a given one, which is scored).
    """

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class SamplingField:
    """Hold a field of SamplingParams as a row has it, and the key, column or file that it comes from."""

    value: Any
    origin: str


@dataclass(frozen=True)
class PromptView:
    """Hold one row as the engine would get it.

    Attributes:
        pieces: the prompt, in order; empty where the row has none.
        token_ids: None where only the engine can tokenize.
        num_tokens: prompt tokens; None where the row has no prompt.
        error: type and message; None for a sound row.
    """

    row: int
    pieces: list[PromptPiece] = field(default_factory=list)
    token_ids: list[int] | None = None
    num_tokens: int | None = None
    num_completion_tokens: int = 0
    adapter: str | None = None
    sampling: dict[str, SamplingField] = field(default_factory=dict)
    error: dict[str, str] | None = None

    @property
    def text(self) -> str:
        """Return the prompt and a given completion as one text."""
        return "".join(piece.text for piece in self.pieces)


class PromptViewer:
    """Make views of rows.

    Args:
        examiner: makes the rows' requests.
        tokenizer: of transformers; None where the engine, or the fake engine, has another.
        media_policy: what may be loaded to look at it.
    """

    def __init__(self, config: Config, examiner: RowExaminer, tokenizer: Any, media_policy: MediaPolicy) -> None:
        self._config, self._examiner, self._tokenizer = config, examiner, tokenizer
        self._media_policy, self._has_seen_media = media_policy, False
        self._special = {} if tokenizer is None else _find_special_tokens(tokenizer)

    @property
    def notes(self) -> list[str]:
        """Return what the views leave out."""
        if not self._has_seen_media:
            return []
        return [
            "tokens of images, audio and video are not counted, and those that are missing or broken are found in the "
            "rows shown alone"
        ]

    def view(self, row: int, columns: Mapping[str, Any]) -> PromptView:
        """Return the view of a row."""
        try:
            request = self._examiner.build(row, columns)
        except RowRefused as error:
            return PromptView(row, error={"type": error.type, "message": error.message})
        rejected, pieces = None, []
        try:
            pieces = self._split(request)
            self._examiner.check(request)
        except RowRefused as error:
            rejected = {"type": error.type, "message": error.message}
        return PromptView(
            row,
            pieces,
            request.prompt_token_ids,
            count_prompt_tokens(request),
            request.num_completion_tokens,
            request.adapter,
            self._resolve_sampling(request, columns),
            rejected,
        )

    def _split(self, request: Request) -> list[PromptPiece]:
        ids = request.prompt_token_ids
        if ids is None:
            self._has_seen_media |= bool(find_media(request.prompt))
            return [PromptPiece(format_untokenized(request.prompt, lambda part: look_at(part, self._media_policy)))]
        num_prompt = len(ids) - request.num_completion_tokens
        pieces = list(self._iter_pieces(ids[:num_prompt]))
        if request.num_completion_tokens:
            before, both = (self._decode(part) for part in (ids[:num_prompt], ids))
            text = both[len(before) :] if both.startswith(before) else self._decode(ids[num_prompt:])
            pieces.append(PromptPiece(text, "completion"))
        return pieces

    def _iter_pieces(self, ids: Sequence[int]) -> Iterator[PromptPiece]:
        start = 0
        for is_special, group in groupby(ids, key=self._special.__contains__):
            run = list(group)
            if is_special:
                yield from (PromptPiece(self._special[token], "special") for token in run)
            elif start == 0:
                yield PromptPiece(self._decode(run))
            else:  # after a token, since tokenizers drop a blank at the beginning of a text
                before, both = self._decode(ids[start - 1 : start]), self._decode(ids[start - 1 : start + len(run)])
                yield PromptPiece(both[len(before) :] if both.startswith(before) else self._decode(run))
            start += len(run)

    def _decode(self, ids: Sequence[int]) -> str:
        if self._tokenizer is not None:
            text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            return text
        if self._config.run.engine == "fake" and self._config.prompt.token_ids_column is None:
            return bytes(ids).decode("utf-8", "replace")  # as `FakeTokenizer` encodes
        return " ".join(map(str, ids))

    def _resolve_sampling(self, request: Request, columns: Mapping[str, Any]) -> dict[str, SamplingField]:
        fields = {}
        for name, value in self._examiner.resolve_sampling(request).items():
            origin = self._find_origin(name, request, columns)
            if name == "max_tokens" and value is None:
                value = self._examiner.find_max_tokens(request, count_prompt_tokens(request))
                origin = "the rest of the context"
            fields[name] = SamplingField(value, origin)
        return fields

    def _find_origin(self, name: str, request: Request, columns: Mapping[str, Any]) -> str:
        """Return what gives a field its value; see `EngineSpec.resolve_sampling` and `RequestBuilder.build`."""
        config, column = self._config, self._config.sampling_columns.get(name)
        if request.num_completion_tokens and name in ("max_tokens", "temperature"):
            return "data.completion_column"
        if name in get_own_sampling(request):
            return "the request"
        if column is not None and columns[column] is not None:
            return f"column {column}"
        if name == "seed":
            return "run.seed and the row's index"
        by_rank = config.sampling_by_rank
        if name in request.sampling and name not in (by_rank[request.row % len(by_rank)] if by_rank else ()):
            return "the program"
        if name in request.sampling:
            return f"sampling_by_rank[{request.row % len(by_rank)}]"
        if name == "structured_outputs" and config.output.schema is not None:
            return "output.schema"
        if name in config.sampling_fields:
            return "sampling"
        return "the model's generation config" if name in self._examiner.of_model else "vLLM's server"


def _find_special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens, by their ids."""
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {token_id: tokenizer.convert_ids_to_tokens(token_id) for token_id in tokenizer.all_special_ids} | added
