"""Read a request to /v1/embeddings of a batch file.

Follows vLLM 0.32: `vllm/entrypoints/pooling/embed/protocol.py` (EmbeddingCompletionRequest). Limits: no chats, and no
fields about how the text is cut or padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpgen.data.openai_batch.lines import BAD_REQUEST, EMBEDDINGS_URL, UNSUPPORTED_REQUEST
from dpgen.data.openai_batch.requests import read_server_request
from dpgen.data.prompts.token_ids import to_text
from dpgen.errors import RowRefused
from dpgen.formatting import describe_type
from dpgen.records import ServerRequest

# Fields that change the answer and that dpgen does not honour, each with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "messages": (None,),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None, "right"),
    "padding": (None, "do_not_pad"),
    "add_special_tokens": (None, True),
    "embed_dtype": (None, "float32"),
    "endianness": (None, "native", "little"),
}


@dataclass(frozen=True)
class EmbeddingsRequest:
    """Hold a request for embeddings.

    Attributes:
        prompts: texts or lists of token ids, at least one.
        dimensions: of each embedding; None for all.
        normalize: True if embeddings get length 1; None as the run, or the model's files, say.
        source: the request without its texts.
    """

    prompts: list[str | list[int]]
    dimensions: int | None
    normalize: bool | None
    source: ServerRequest


def read_embeddings_request(text: Any) -> EmbeddingsRequest:
    """Return the request of a line.

    Raises:
        RowRefused: `bad_request`, `unsupported_request`, `invalid_text`.
    """
    request = read_server_request(text)
    if request.url != EMBEDDINGS_URL:
        raise RowRefused(UNSUPPORTED_REQUEST, f"'url' is '{request.url}': task=generate answers it, not task=embed")
    body = request.body
    for key, harmless in _UNSUPPORTED.items():
        if body.get(key) not in harmless:
            raise RowRefused(UNSUPPORTED_REQUEST, f"{key!r} is set, and dpgen does not support it for embeddings yet")
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise RowRefused(BAD_REQUEST, f"'encoding_format' is {body['encoding_format']!r}, not 'float' or 'base64'")
    dimensions = body.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise RowRefused(BAD_REQUEST, f"'dimensions' is {dimensions!r}: must be a whole number of at least 1")
    normalize = body.get("use_activation")
    if normalize is not None and type(normalize) is not bool:
        raise RowRefused(BAD_REQUEST, f"'use_activation' is {normalize!r}: must be true or false")
    source = ServerRequest(request.url, {key: value for key, value in body.items() if key != "input"})
    return EmbeddingsRequest(_read_prompts(body.get("input")), dimensions, normalize, source)


def find_embeddings_text(line: Any) -> str | None:
    """Return the texts of a request for embeddings as one, to measure it by; None for other requests and bad ones."""
    try:
        request = read_embeddings_request(line)
    except RowRefused:
        return None
    return "\n".join(prompt if isinstance(prompt, str) else to_text(prompt) for prompt in request.prompts)


def _read_prompts(value: Any) -> list[str | list[int]]:
    """Return the texts or the lists of token ids of 'input', which may be one or a list of them."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise RowRefused(BAD_REQUEST, f"'input' is {describe_type(value)}, not a string or a list")
    if not value:
        raise RowRefused(BAD_REQUEST, "'input' is an empty list")
    if all(type(item) is int for item in value):
        return [value]
    for index, item in enumerate(value):
        is_list = isinstance(item, list) and item and all(type(token_id) is int for token_id in item)
        if not isinstance(item, str) and not is_list:
            raise RowRefused(BAD_REQUEST, f"'input' item {index} is {describe_type(item)}, no text and no token ids")
    if len({type(item) for item in value}) > 1:
        raise RowRefused(BAD_REQUEST, "'input' mixes texts and token ids")
    return list(value)
