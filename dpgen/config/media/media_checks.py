"""Check the keys of `data` about images, audio and video, as far as it shows without the input.

Each function yields one line for each mistake: key=value, then what the value must be.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dpgen.errors import ConfigError

if TYPE_CHECKING:
    from dpgen.config.prompt import PromptConfig
    from dpgen.config.sections import DataConfig

MEDIA_COLUMN_KEYS = ("images_column", "audios_column", "videos_column")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?(:\d{1,5})?")


def find_wrong_media_values(data: DataConfig) -> Iterator[str]:
    """Yield one line for each wrong value of the keys about media."""
    named: list[str] = []
    for key in MEDIA_COLUMN_KEYS:
        value = getattr(data, key)
        names = [value] if isinstance(value, str) else value
        if value is None:
            continue
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) and n for n in names):
            yield f"data.{key}={value!r}: must be a column's name, a list of columns, or null"
        else:
            named += names
    for name, count in Counter(named).items():
        if count > 1:
            yield f"data.{' and data.'.join(_find_keys_of(data, name))}: the column {name!r} is named {count} times"
    for host in data.fetch_urls:
        if not _HOST.fullmatch(host):
            yield (
                f"data.fetch_urls: {host!r} is no host: write it without http:// and path, as images.example.com, "
                "'*.example.com' or 'images.example.com:8080'"
            )
    workers = data.media_workers
    if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        yield f"data.media_workers={workers!r}: must be auto, or a whole number of at least 1"
    if data.media_dir is not None and "://" in data.media_dir:
        yield f"data.media_dir={data.media_dir}: must be a folder on a disk of each node"


def find_wrong_media_use(prompt: PromptConfig, task: str) -> Iterator[str]:
    """Yield one line for each key that media don't go with."""
    keys = [f"data.{key}" for key in MEDIA_COLUMN_KEYS if getattr(prompt, key) is not None]
    if not keys:
        return
    if task != "generate":
        yield f"{keys[0]} needs task=generate: task={task} reads texts"
    if prompt.is_pair:
        yield f"{keys[0]} and data.query_column are set: pairs are texts"
    for name, reason in (
        ("token_ids_column", "token ids have no places for media; give the text or messages"),
        ("completion_column", "given completions are scored after texts alone"),
    ):
        if getattr(prompt, name) is not None:
            yield f"{keys[0]} and data.{name} are set: {reason}"


def check_media_dir(media_dir: str | None) -> None:
    """Raise ConfigError if `data.media_dir` is no folder on this machine."""
    if media_dir is not None and not os.path.isdir(os.path.expanduser(media_dir)):
        raise ConfigError(f"data.media_dir={media_dir}: there is no such folder")


def _find_keys_of(data: Any, name: str) -> list[str]:
    keys = ((key, getattr(data, key)) for key in MEDIA_COLUMN_KEYS)
    return [key for key, value in keys if value == name or (isinstance(value, list | tuple) and name in value)]
