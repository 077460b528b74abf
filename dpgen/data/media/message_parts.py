"""Read the parts of messages that hold a medium, in the forms of OpenAI's API, vLLM, transformers and datasets.

- OpenAI and vLLM: ``{type: image_url, image_url: {url}}`` or a URL alone, ``input_image``, ``input_audio``,
  ``audio_url``, ``video_url``.
- transformers and datasets: ``{type: image, image: ...}``, where the value is as in a column; or ``url``, ``path`` or
  ``base64`` in its place. The same of audio and video. Without a value it is a placeholder, which a column fills.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpgen.data.media.parts import MediaKind, MediaPart
from dpgen.data.media.values import read_medium
from dpgen.errors import RowRefused
from dpgen.formatting import describe_type


class _PartType(NamedTuple):
    kind: MediaKind
    keys: tuple[str, ...]  # that may hold the medium
    may_be_placeholder: bool = False


_PART_TYPES = {
    "image_url": _PartType("image", ("image_url",)),
    "input_image": _PartType("image", ("image_url",)),
    "input_audio": _PartType("audio", ("input_audio",)),
    "audio_url": _PartType("audio", ("audio_url",)),
    "video_url": _PartType("video", ("video_url",)),
    "image": _PartType("image", ("image", "url", "path", "base64", "image_url"), True),
    "audio": _PartType("audio", ("audio", "url", "path", "base64", "audio_url"), True),
    "video": _PartType("video", ("video", "url", "path", "base64", "video_url"), True),
}
# Keys that say what the medium is; the chat template receives the others.
MEDIA_PART_KEYS = frozenset(key for part_type in _PART_TYPES.values() for key in part_type.keys) | {"index", "detail"}


def read_media_part(where: str, part: Mapping[str, Any]) -> MediaPart | None:
    """Return the medium of a part; None for a part of another type.

    Args:
        where: the part's place, for messages.

    Raises:
        RowRefused: `wrong_type`, `media_missing`.
    """
    type = part.get("type")
    if type is None:  # vLLM takes such a part by its key
        type = next((name for name in ("image_url", "audio_url", "input_audio", "video_url") if name in part), None)
    if not isinstance(type, str) or type not in _PART_TYPES:
        return None
    kind, keys, may_be_placeholder = _PART_TYPES[type]
    given = [key for key in keys if part.get(key) not in (None, {}, "")]
    if len(given) > 1:
        raise RowRefused("wrong_type", f"{where}: {' and '.join(map(repr, given))} are set: give the {kind} once")
    if not given:
        if not may_be_placeholder:
            raise RowRefused("wrong_type", f"{where} has no {keys[0]!r} with the {kind}")
        return MediaPart(kind, where, index=_read_index(where, part.get("index")))
    key = given[0]
    value = _unwrap(where, key, part[key])
    medium = read_medium(kind, where, value)
    assert medium is not None, "null and empty values were left out"
    return medium


def _unwrap(where: str, key: str, value: Any) -> Any:
    """Return the value of a part's key as a column would hold it."""
    if key == "input_audio":
        if not isinstance(value, Mapping) or not isinstance(value.get("data"), str) or not value["data"]:
            raise RowRefused("wrong_type", f"{where}: 'input_audio' has no 'data' that is base64 text")
        return f"data:audio/{value.get('format', 'wav')};base64,{value['data']}"
    if key == "base64":
        if not isinstance(value, str):
            raise RowRefused("wrong_type", f"{where}: 'base64' is {describe_type(value)}, not a string")
        return value if value[:5].lower() == "data:" else f"data:;base64,{value}"
    if key.endswith("_url") and isinstance(value, Mapping):
        url = value.get("url")
        if not isinstance(url, str) or not url:
            raise RowRefused("wrong_type", f"{where}: {key!r} has no 'url' that is a string")
        return url
    return value


def _read_index(where: str, value: Any) -> int | None:
    if value is None or (type(value) is int and value >= 0):
        return value
    raise RowRefused("wrong_type", f"{where}: 'index' is {value!r}, not the number of a column's medium, from 0")
