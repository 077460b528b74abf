"""Define a medium of a prompt, and prompts with media; find the media of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpgen.formatting import format_bytes

MediaKind = Literal["image", "audio", "video"]
MEDIA_KINDS: tuple[MediaKind, ...] = get_args(MediaKind)
MEDIA_TYPE = "media"  # of the parts of a message that hold a `MediaPart`, under this key too
# Types of rows' errors.
MISSING, INVALID, TOO_LARGE = "media_missing", "media_invalid", "media_too_large"
NOT_ALLOWED, FETCH_FAILED, MISMATCH = "media_not_allowed", "media_fetch_failed", "media_mismatch"
_MAX_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True, repr=False)
class MediaPart:
    """Hold one medium of a prompt, as its contents or as where these are.

    Attributes:
        kind: "image", "audio" or "video".
        where: its place in the row, for messages: "images, item 2", "message 0, part 1".
        data: the contents of the file; None where `source` says where they are.
        source: a path, a ``data:``, ``file:``, ``http:`` or ``https:`` URL; beside `data`, only its name. A medium with
            neither is a placeholder, which a column fills.
        index: of a placeholder: which of the columns' media it stands for; None for the next one.
    """

    kind: MediaKind
    where: str
    data: bytes | None = None
    source: str | None = None
    index: int | None = None

    @property
    def is_placeholder(self) -> bool:
        """Return True if a column has to say what the medium is."""
        return self.data is None and self.source is None

    @property
    def reference(self) -> str | None:
        """Return where the medium is; None where only its contents are known."""
        return None if self.source is None or is_data_url(self.source) else self.source

    def describe(self) -> str:
        """Return a short text for the medium, without its contents: ``<image a.png>``, ``<image, 31 kB>``."""
        if self.reference is not None:
            return f"<{self.kind} {shorten(self.reference)}>"
        if self.is_placeholder:
            return f"<{self.kind}>"
        num_bytes = len(self.data) if self.data is not None else len(self.source or "") * 3 // 4
        return f"<{self.kind}, {format_bytes(num_bytes)}>"

    def __repr__(self) -> str:
        """Return `describe`: contents are no reading matter."""
        return self.describe()


@dataclass(frozen=True, slots=True)
class MediaText:
    """Hold a text prompt with media, as LLM.generate takes it with multi_modal_data.

    Attributes:
        text: the prompt, with the marks that the model wants in the places of the media.
        media: in the order of the columns.
    """

    text: str
    media: tuple[MediaPart, ...]


def find_media(prompt: Any) -> list[MediaPart]:
    """Return the media of a prompt that `PromptRenderer.build_prompt` has made, in order of appearance."""
    if isinstance(prompt, MediaText):
        return list(prompt.media)
    return [part[MEDIA_TYPE] for part in iter_media_parts(prompt["messages"])] if isinstance(prompt, dict) else []


def iter_media_parts(messages: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of validated messages that hold a medium."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == MEDIA_TYPE:
                yield part


def is_data_url(source: str) -> bool:
    """Return True if a source holds the contents itself."""
    return source[:5].lower() == "data:"


def is_http_url(source: str) -> bool:
    """Return True if a source has to be fetched."""
    return source[:8].lower().startswith(("http://", "https://"))


def shorten(text: str) -> str:
    """Return a path or URL for a message; of a long one the beginning, of a data: URL what it says of itself."""
    if is_data_url(text):
        return f"{text[:_MAX_SHOWN_CHARS].partition(',')[0]},..."
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
