"""Replace the addresses of `data.path` by files on this node's disk, and put them back in messages."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpgen.config.sections import DataConfig
from dpgen.data.storage.listing import Listing, find_addresses, list_addresses
from dpgen.data.storage.store import show_address
from dpgen.errors import ConfigError


@dataclass(frozen=True)
class FetchedInput:
    """Hold the section `data` as it is read.

    Attributes:
        data: with local paths only.
        names: what a message says in place of each local path.
    """

    data: DataConfig
    names: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def name_addresses(self) -> Iterator[None]:
        """Let errors about fetched files name their addresses."""
        try:
            yield
        except ConfigError as error:
            if not self.names:
                raise
            raise ConfigError(*map(self._name, error.mistakes)) from None

    def _name(self, text: str) -> str:
        for local, name in sorted(self.names.items(), key=lambda item: -len(item[0])):
            text = text.replace(local, name)
        return text


def fetch_input(
    data: DataConfig, listing: Listing | None = None, on_wait: Callable[[], None] = lambda: None
) -> FetchedInput:
    """Return the section with local files in place of addresses, which are fetched where the cache lacks them.

    Args:
        listing: what the addresses stand for; None to ask their stores.

    Raises:
        ConfigError: a store refuses or has nothing of that name; or the disk is full.
        TransferStopped: a store broke off.
    """
    addresses = find_addresses(data.path)
    if not addresses:
        return FetchedInput(data)
    from dpgen.data.storage.fetching import Fetcher

    if listing is None:
        listing = list_addresses(addresses, data.storage_options, on_wait)
    files = Fetcher(find_cache(data), data.storage_options, on_wait).fetch(listing)
    parts = [data.path] if isinstance(data.path, str) else list(data.path)
    paths = [file for part in parts for file in files.get(part, [part])]
    names: dict[str, str] = {}
    for address in addresses:
        scheme, objects = address.partition("://")[0], listing[address].objects
        if listing[address].is_folder or len(objects) == 1:
            names[files[address][0]] = show_address(address)
            continue
        for file, item in zip(files[address], objects, strict=True):
            names[file] = show_address(item.path if "://" in item.path else f"{scheme}://{item.path}")
    path: Any = paths[0] if len(paths) == 1 else paths
    names[str(path)] = show_address(data.path) if isinstance(data.path, str) else str(list(map(show_address, parts)))
    return FetchedInput(dataclasses.replace(data, path=path), names)


def find_cache(data: DataConfig) -> Path:
    """Return the folder that fetched files are kept in."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser().absolute()
    from huggingface_hub import constants

    folder = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    # Path.expanduser raises for a user without a home, for whom the library leaves "~" as it is.
    return Path(os.path.expanduser(folder)).absolute() / "dpgen"
