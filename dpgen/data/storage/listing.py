"""List the objects that addresses of `data.path` stand for: one object, those of a pattern, or those of a folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpgen.config.checks import find_scheme
from dpgen.data.reading.files import is_data_file, list_names
from dpgen.data.storage.store import LOCAL_SCHEMES, WEB_SCHEMES, Store, StoredObject, call_store, open_store, to_object
from dpgen.errors import ConfigError, find_nearest_name

_SAVED_DATASET = ("state.json", "dataset_dict.json")
_CARD = "README.md"


@dataclass(frozen=True)
class ListedAddress:
    """Hold the objects of one address.

    Attributes:
        objects: in the order in which they are read.
        is_folder: whether the address names a folder, whose files are read as those of a local one.
    """

    objects: tuple[StoredObject, ...]
    is_folder: bool = False


Listing = Mapping[str, ListedAddress]


def encode_listing(listing: Listing) -> dict[str, list[Any]]:
    """Return a listing as values that ranks can send each other."""
    return {
        address: [listed.is_folder, [list(vars(item).values()) for item in listed.objects]]
        for address, listed in listing.items()
    }


def decode_listing(values: Mapping[str, Sequence[Any]]) -> Listing:
    """Return what `encode_listing` was given."""
    return {
        address: ListedAddress(tuple(StoredObject(*facts) for facts in objects), is_folder)
        for address, (is_folder, objects) in values.items()
    }


def find_addresses(path: object) -> list[str]:
    """Return the parts of `data.path` that are addresses of a store."""
    parts = [path] if isinstance(path, str) else path if isinstance(path, (list, tuple)) else []
    return [part for part in parts if isinstance(part, str) and find_scheme(part) not in (None, *LOCAL_SCHEMES)]


def list_addresses(
    addresses: Sequence[str], options: Mapping[str, Any], on_wait: Callable[[], None] = lambda: None
) -> Listing:
    """Return the objects of addresses, as their stores have them now.

    Raises:
        ConfigError: a store can't be asked, or has nothing of that name.
    """
    listing = {}
    for address in addresses:
        store = open_store(address, options)
        listing[address] = call_store(store, lambda store=store: _list(store), "to list it", on_wait)  # type: ignore[misc]
    return listing


def get_relative_name(store_path: str, item: StoredObject) -> str:
    """Return an object's name below a folder."""
    return os.path.relpath(item.path, store_path)


def _list(store: Store) -> ListedAddress:
    store.file_system.invalidate_cache()
    is_web, path = store.scheme in WEB_SCHEMES, store.path
    if is_web and path.partition("?")[0].endswith("/"):
        raise ConfigError(f"{store.label}: folders of a web server can't be listed; name the files")
    if is_web and "*" in path.partition("?")[0]:
        return ListedAddress(_match(store, path))
    if not path.endswith("/") and (found := store.find(path)) is not None:
        return ListedAddress((found,))
    if glob.has_magic(path):
        return ListedAddress(_match(store, path))
    below = store.list_below(path)
    if not below:
        raise ConfigError(_explain_absence(store))
    names = [get_relative_name(path, item) for item in below]
    is_saved = any(os.path.basename(name) in _SAVED_DATASET for name in names)
    visible = [
        item
        for item, name in zip(below, names, strict=True)
        if not any(part.startswith(".") for part in name.split("/"))
        and (is_saved or is_data_file(name) or name == _CARD)
    ]
    if not any(is_saved or is_data_file(item.path) for item in visible):
        raise ConfigError(f"{store.label}: holds no data file; it holds {list_names(names)}")
    return ListedAddress(tuple(visible), is_folder=True)


def _match(store: Store, pattern: str) -> tuple[StoredObject, ...]:
    """Return the objects that match a pattern, by path."""
    found = store.file_system.glob(pattern, detail=True)
    files = [to_object(facts) for facts in found.values() if facts.get("type") != "directory"]
    files = [item for item in files if not item.path.endswith("/")]
    if not files:
        raise ConfigError(f"{store.label}: no object matches")
    if store.scheme in WEB_SCHEMES:  # a page's links say nothing of what they lead to
        files = [replace(store.find(item.path) or item, path=item.path) for item in files]
    return tuple(sorted(files, key=lambda item: item.path))


def _explain_absence(store: Store) -> str:
    """Return that there is no such object, and what is beside it."""
    shown, (folder, _, name) = store.label, store.path.rstrip("/").rpartition("/")
    try:
        beside = [os.path.basename(str(path).rstrip("/")) for path in store.file_system.ls(folder, detail=False)]
    except FileNotFoundError:
        return f"{shown}: there is no such object or folder, and nothing beside it"
    nearest = find_nearest_name(name, beside) if beside else None
    hint = f"did you mean {nearest}? " if nearest else ""
    return f"{shown}: there is no such object or folder; {hint}beside it: {list_names(sorted(beside)) or 'nothing'}"
