"""Read the texts of a row that are not its prompt: a given completion, and the two sides of a pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.config.prompt import PromptConfig
from dpgen.errors import RowRefused
from dpgen.formatting import describe_type, suggest_conversion
from dpgen.programs.handle import ModelCall


def find_completion(row: Mapping[str, Any], config: PromptConfig) -> str | None:
    """Return the text to score after the row's prompt, or its call's; None to generate.

    Raises:
        RowRefused: as `get_completion`.
    """
    if config.call_column is not None:
        call: ModelCall = row[config.call_column]
        return None if call.completion is None else get_completion({"completion": call.completion}, "completion")
    return None if config.completion_column is None else get_completion(row, config.completion_column)


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
    reject_surrogates(text)
    return text


def read_pair(row: Mapping[str, Any], config: PromptConfig) -> tuple[str, list[str]]:
    """Return a row's query, and its documents.

    Raises:
        RowRefused: `wrong_type`, `empty_prompt`, `invalid_text`.
    """
    column = config.document_column or config.documents_column
    assert config.query_column is not None and column is not None
    query, documents = row.get(config.query_column), row.get(column)
    if config.documents_column is None:
        documents = [documents]
    elif not isinstance(documents, list | tuple):
        raise RowRefused("wrong_type", f"{column} is {describe_type(documents)}, not a list of strings")
    if not documents:
        raise RowRefused("empty_prompt", f"{column} is an empty list: there is nothing to score")
    for name, text in [(config.query_column, query), *((column, document) for document in documents)]:
        if not isinstance(text, str):
            raise RowRefused("wrong_type", f"{name} is {describe_type(text)}, not a string")
        reject_surrogates(text)
    return str(query), list(documents)


def reject_surrogates(text: str) -> None:
    """Raise RowRefused (`invalid_text`) if no encoding can hold the text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # as `surrogateescape` reads bytes
            what = (
                f"the byte 0x{code - 0xDC00:02X}, which is not valid UTF-8 there: convert a file in another encoding, "
            )
            what += f"e.g. {suggest_conversion()}"
        else:
            what = "half of a surrogate pair, which no encoding of text can hold"
        raise RowRefused("invalid_text", f"character {error.start} is {what}") from None
