"""Look at a medium for a person: what it is, how large, and whether it can be read at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpgen.data.media.images import check_image
from dpgen.data.media.loading import load_media
from dpgen.data.media.parts import MEDIA_TYPE, MediaPart, MediaText, is_http_url
from dpgen.data.media.policy import MediaPolicy
from dpgen.formatting import format_bytes

Describe = Callable[[MediaPart], str]


def look_at(part: MediaPart, policy: MediaPolicy) -> str:
    """Return ``<image 640x480 PNG, 31.0 kB>``; of what would have to be fetched only where it is.

    Raises:
        RowRefused: as `load_media` and `check_image`.
    """
    if part.data is None and part.source is not None and is_http_url(part.source):
        return part.describe()
    data = load_media(part, policy)
    if part.kind != "image":
        return f"<{part.kind}, {format_bytes(len(data))}>"
    facts = check_image(data, policy, part.where)
    return f"<image {facts.width}x{facts.height} {facts.format}, {format_bytes(len(data))}>"


def format_messages(messages: list[dict[str, Any]], describe: Describe = MediaPart.describe) -> str:
    """Return a chat for a person, message by message, each medium in a few words."""
    return "\n".join(f"{message['role']}: {_format_content(message.get('content'), describe)}" for message in messages)


def format_media_text(prompt: MediaText, describe: Describe = MediaPart.describe) -> str:
    """Return a text prompt for a person, after its media in a few words each."""
    return "".join(f"{describe(part)}\n" for part in prompt.media) + prompt.text


def _format_content(content: Any, describe: Describe) -> str:
    if not isinstance(content, list) or not any(isinstance(part, dict) and MEDIA_TYPE in part for part in content):
        return str(content or "")
    return "\n".join(_format_part(part, describe) for part in content)


def _format_part(part: Any, describe: Describe) -> str:
    if isinstance(part, dict):
        return describe(part[MEDIA_TYPE]) if MEDIA_TYPE in part else str(part.get("text", ""))
    return str(part)
