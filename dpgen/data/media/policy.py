"""Say what a run may load as media, and how much of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpgen.config.checks import find_scheme
from dpgen.config.sections import DataConfig
from dpgen.data.reading.files import find_all_files, list_data_files, looks_local


@dataclass(frozen=True)
class MediaPolicy:
    """Hold what may be loaded as media.

    Attributes:
        roots: folders that relative paths start from, the first that has the file; nothing outside of them is read.
        fetch_hosts: hosts that URLs may name, in lower case: "images.example.com", "*.example.com", "host:8080".
        max_bytes: of one medium's file.
        max_pixels: of one image.
        fetch_timeout_s: in which a URL is fetched, redirects and repeated tries included.
    """

    roots: tuple[str, ...] = ()
    fetch_hosts: tuple[str, ...] = ()
    max_bytes: int = 256 << 20
    max_pixels: int = 178_956_970
    fetch_timeout_s: float = 30.0

    @classmethod
    def from_config(cls, data: DataConfig) -> MediaPolicy:
        """Return the policy that `data.*` asks for; call it in the rank, since it looks at the input's folders."""
        return cls(
            roots=_find_roots(data),
            fetch_hosts=tuple(host.lower() for host in data.fetch_urls),
            max_bytes=data.max_media_bytes,
            max_pixels=data.max_image_pixels,
            fetch_timeout_s=data.fetch_timeout_s,
        )


def _find_roots(data: DataConfig) -> tuple[str, ...]:
    """Return `data.media_dir`, or the folders of the input's files; for a Hub name those where its files are kept."""
    if data.media_dir is not None:
        return (os.path.abspath(os.path.expanduser(data.media_dir)),)
    paths = [data.path] if isinstance(data.path, str) else list(data.path)
    local = [path for path in paths if find_scheme(path) in (None, "file", "local")]
    if not local:
        return ()
    if files := find_all_files(local):
        folders = [os.path.dirname(os.path.abspath(file)) for file in files]
    else:
        folder = str(Path(local[0]).expanduser())
        if not (os.path.isdir(folder) or looks_local(folder)):
            from dpgen.data.input_loading import list_hub_folders  # workers, which need the class alone, do without

            return list_hub_folders(folder)
        folders = [os.path.abspath(folder), *(os.path.dirname(os.path.abspath(f)) for f in list_data_files(folder))]
    return tuple(dict.fromkeys(folders))
