"""Put the media of a row's columns into its prompt: in the places of placeholders, or before the first user's text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpgen.config.prompt import PromptConfig
from dpgen.data.media.parts import MEDIA_KINDS, MEDIA_TYPE, MISMATCH, MediaKind, MediaPart, iter_media_parts
from dpgen.data.media.values import read_media
from dpgen.errors import RowRefused
from dpgen.formatting import format_count

MediaByKind = dict[MediaKind, list[MediaPart]]


def read_media_columns(row: Mapping[str, Any], config: PromptConfig) -> MediaByKind:
    """Return the media of the columns that `data.images_column` and its like name, by kind, each in order.

    Raises:
        RowRefused: `wrong_type`.
    """
    columns = config.media_columns
    return {
        kind: [medium for name in columns[kind] for medium in read_media(kind, name, row.get(name))]
        for kind in MEDIA_KINDS
    }


def put_media_into_chat(messages: list[dict[str, Any]], media: MediaByKind, config: PromptConfig) -> None:
    """Put columns' media into a chat, in place.

    Placeholders of a kind are filled in order, or by their index. Without any, the media come before the text of the
    first user message: images, then audio, then video.

    Args:
        messages: as `validate_messages` returns them.

    Raises:
        RowRefused: `media_mismatch`: there are not as many media as placeholders, or no user message.
    """
    ahead: list[MediaPart] = []
    for kind in MEDIA_KINDS:
        parts = [
            part
            for part in iter_media_parts(messages)
            if part[MEDIA_TYPE].kind == kind and part[MEDIA_TYPE].is_placeholder
        ]
        if not parts:
            ahead += media[kind]
            continue
        for part, medium in zip(parts, _choose(parts, media[kind], config), strict=True):
            part[MEDIA_TYPE] = medium
    if not ahead:
        return
    message = next((message for message in messages if message["role"] == "user"), None)
    if message is None:
        raise RowRefused(MISMATCH, f"there is no user message to put {ahead[0].where} into")
    content = message.get("content", [])
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    message["content"] = [*({"type": MEDIA_TYPE, MEDIA_TYPE: medium} for medium in ahead), *texts]


def _choose(parts: list[dict[str, Any]], media: list[MediaPart], config: PromptConfig) -> list[MediaPart]:
    """Return the medium of each placeholder."""
    places = [part[MEDIA_TYPE].index for part in parts]
    if None in places:
        places = list(range(len(parts)))
    if set(places) == set(range(len(media))):
        return [media[place] for place in places]
    kind = parts[0][MEDIA_TYPE].kind
    key = f"data.{kind}s_column"
    if not config.media_columns[kind]:
        raise RowRefused(MISMATCH, f"{parts[0][MEDIA_TYPE].where} has no {kind}: put it there, or set {key}")
    raise RowRefused(
        MISMATCH,
        f"the messages have {format_count(len(set(places)), 'placeholder')} for {kind} parts, and "
        f"{' and '.join(config.media_columns[kind])} {format_count(len(media), 'value')}",
    )
