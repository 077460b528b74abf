"""Fetch listed objects to this node's disk, once for each version of their contents.

- An object's place in the cache follows from its store, path, size and version: what has changed is fetched again.
- An object is written beside its place and renamed once it is whole. What was interrupted continues where it stopped.
- Of several processes that share the cache folder, one fetches an object, and the others wait for it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dpgen.config.secrets import redact_text
from dpgen.data.storage.listing import ListedAddress, Listing, get_relative_name
from dpgen.data.storage.store import WEB_SCHEMES, Store, StoredObject, open_store, show_address
from dpgen.data.storage.store_errors import is_lasting
from dpgen.errors import ConfigError, DpgenError, TransferStopped
from dpgen.formatting import format_bytes, format_count, format_duration
from dpgen.lifecycle.new_folder import fill_new_folder
from dpgen.log import PeriodicLog

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NUM_OBJECTS, _NUM_PIECES = 4, 4  # at a time; pieces of each object
_PIECE_BYTES = 16 << 20
_MAX_TRIES = 5
_POLL_S = 0.2
_MAX_NAME = 200  # characters of a file's name, from its end
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class Fetcher:
    """Fetch the objects of a listing.

    Args:
        cache: the folder to keep them in.
        options: of their stores, `data.storage_options`.
        on_wait: is called again and again while objects are fetched.
    """

    def __init__(self, cache: Path, options: Mapping[str, Any], on_wait: Callable[[], None] = lambda: None) -> None:
        self._cache, self._options, self._on_wait = cache, options, on_wait
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._num_bytes = self._num_fetched = 0

    def fetch(self, listing: Listing) -> dict[str, list[str]]:
        """Return the local files of each address; for a folder, the folder.

        Raises:
            ConfigError: the disk is full or can't be written; or an object has changed since it was listed.
            TransferStopped: the store broke off.
        """
        started_s = time.monotonic()
        stores = {address: open_store(address, self._options) for address in listing}
        places = {
            address: [self._find_place(stores[address], item) for item in listed.objects]
            for address, listed in listing.items()
        }
        missing = {
            place: (stores[address], item)
            for address, listed in listing.items()
            for place, item in zip(places[address], listed.objects, strict=True)
            if not _is_whole(place, item)
        }
        if missing:
            self._check_space([item for _, item in missing.values()])
            self._fetch_all(missing)
            if self._num_fetched:
                num_bytes, duration = format_bytes(self._num_bytes), format_duration(time.monotonic() - started_s)
                count = format_count(self._num_fetched, "object")
                logger.info(f"fetched {count} ({num_bytes}) in {duration}, to {self._cache}")
        return {
            address: [str(self._mirror(stores[address], listed, places[address]))]
            if listed.is_folder
            else [str(place) for place in places[address]]
            for address, listed in listing.items()
        }

    def _find_place(self, store: Store, item: StoredObject) -> Path:
        version = item.version or f"unknown {uuid.uuid4().hex}"  # then it is fetched at each start
        facts = [store.scheme, store.endpoint, redact_text(item.path), item.size, version]
        key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        path = item.path.partition("?")[0] if store.scheme in WEB_SCHEMES else item.path
        return self._cache / "objects" / key / os.path.basename(path)[-_MAX_NAME:]

    def _check_space(self, items: Sequence[StoredObject]) -> None:
        needed = sum(item.size or 0 for item in items)
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._cache).free
        except OSError as error:
            raise self._make_disk_error(self._cache, error) from None
        if needed > free:
            raise ConfigError(
                f"data.path needs {format_bytes(needed)} on the disk of {self._cache}, where {format_bytes(free)} are "
                "free: free space, or choose another folder with data.cache_dir"
            )

    def _fetch_all(self, missing: Mapping[Path, tuple[Store, StoredObject]]) -> None:
        """Fetch objects in threads, and wait for them in this one."""
        total = sum(item.size or 0 for _, item in missing.values())
        log = PeriodicLog(
            logger,
            lambda: (
                f"fetching the input: {self._num_fetched:,} of {format_count(len(missing), 'object')}, "
                f"{format_bytes(self._num_bytes)} of {format_bytes(total)}"
            ),
            on_all_ranks=True,
        )

        def on_wait(_: int) -> None:
            self._on_wait()
            log()

        transfers = [partial(self._fetch_one, place, *missing[place]) for place in missing]
        run_transfers(transfers, _NUM_OBJECTS, self._stop, on_wait)

    def _fetch_one(self, place: Path, store: Store, item: StoredObject) -> None:
        shown = _show(store, item)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(place.with_name(".lock")) as is_locked:
                if _is_whole(place, item):
                    return
                own = "" if is_locked else f".{uuid.uuid4().hex}"  # without locks no two processes share a file
                part = place.with_name(f"{place.name}{own}.part")
                self._read(part, store, item)
                now = store.find(item.path)
                if now is None or (now.size, now.version) != (item.size, item.version):
                    raise ConfigError(f"{shown} changed while it was fetched. Start again once it is complete")
                if item.size not in (None, part.stat().st_size):
                    part.unlink()
                    raise TransferStopped(f"{shown}: what came has another size. The same command fetches it again")
                os.replace(part, place)
        except DpgenError:
            raise
        except OSError as error:
            if error.errno in _DISK_ERRORS and not isinstance(error, FileNotFoundError) and error.filename != item.path:
                raise self._make_disk_error(place, error) from None
            raise self._make_store_error(store, item, error) from None
        except Exception as error:  # noqa: BLE001 - each store's package has errors of its own
            raise self._make_store_error(store, item, error) from None
        with self._lock:
            self._num_fetched += 1

    def _read(self, part: Path, store: Store, item: StoredObject) -> None:
        """Write an object's contents, after what an interrupted start has written."""
        if item.size is None or not item.is_ranged or item.version is None:
            store.file_system.get_file(item.path, str(part))
            num_bytes = part.stat().st_size
            if item.size not in (None, num_bytes):
                raise ConfigError(f"{_show(store, item)} has {num_bytes:,} bytes, and its store says {item.size:,}")
            self._count(num_bytes)
            return
        with open(part, "ab") as file, ThreadPoolExecutor(_NUM_PIECES, "fetch-piece") as pool:
            if file.tell() > item.size:
                file.truncate(0)
            starts = range(file.tell(), item.size, _PIECE_BYTES)
            for first in range(0, len(starts), _NUM_PIECES):
                batch = starts[first : first + _NUM_PIECES]
                for piece in pool.map(lambda start: self._read_piece(store, item, start), batch):
                    file.write(piece)
                    file.flush()
                    self._count(len(piece))
            os.fsync(file.fileno())

    def _read_piece(self, store: Store, item: StoredObject, start: int) -> bytes:
        assert item.size is not None
        stop = min(item.size, start + _PIECE_BYTES)

        def read() -> bytes:
            piece: bytes = store.file_system.cat_file(item.path, start=start, end=stop)
            if len(piece) != stop - start:
                raise ConfigError(f"{_show(store, item)} changed while it was fetched. Start again once it is complete")
            return piece

        return retry(read, self._stop)

    def _count(self, num_bytes: int) -> None:
        if self._stop.is_set():
            raise TransferStopped("another object could not be fetched")
        with self._lock:
            self._num_bytes += num_bytes

    @contextmanager
    def _locked(self, path: Path) -> Iterator[bool]:
        """Hold a lock among processes; yield False where the file system has none.

        Raises:
            TransferStopped: the fetch has ended while this waited for another process.
        """
        with open(path, "ab") as file:
            is_locked = True
            while not self._stop.is_set():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._stop.wait(_POLL_S)
                    continue
                except OSError:
                    is_locked = False
                break
            else:
                raise TransferStopped("another object could not be fetched")
            yield is_locked

    def _mirror(self, store: Store, listed: ListedAddress, places: Sequence[Path]) -> Path:
        """Return a folder with the names of a stored one, whose files are what was fetched."""
        names = [get_relative_name(store.path, item) for item in listed.objects]
        key = hashlib.blake2b(json.dumps([names, list(map(str, places))]).encode(), digest_size=16).hexdigest()
        folder = self._cache / "folders" / key / (os.path.basename(store.path.rstrip("/")) or store.scheme)
        if folder.exists():
            if all(_is_same(folder / name, place) for name, place in zip(names, places, strict=True)):
                return folder
            with suppress(OSError):  # of files that were fetched again since
                folder.rename(folder.with_name(f".old-{uuid.uuid4().hex}"))
        try:
            with suppress(FileExistsError), fill_new_folder(folder) as new_folder:
                for name, place in zip(names, places, strict=True):
                    (new_folder / name).parent.mkdir(parents=True, exist_ok=True)
                    try:
                        os.link(place, new_folder / name)
                    except OSError:  # the file system has no hard links
                        os.symlink(place, new_folder / name)
        except OSError as error:
            raise self._make_disk_error(folder, error) from None
        return folder

    def _make_disk_error(self, place: Path, error: OSError) -> ConfigError:
        return ConfigError(
            f"{place} can't be written: {error.strerror or error}. Free space, or choose another folder with "
            "data.cache_dir"
        )

    def _make_store_error(self, store: Store, item: StoredObject, error: Exception) -> DpgenError:
        text = store.describe_error(error, _show(store, item))
        if is_lasting(error):
            return ConfigError(text)
        return TransferStopped(f"fetching the input broke off: {text}. The same command continues it")


def run_transfers(
    transfers: Iterable[Callable[[], None]], num_threads: int, stop: threading.Event, on_wait: Callable[[int], None]
) -> None:
    """Run transfers in threads, and wait for them in this one; the first error ends all.

    Args:
        stop: is set at the end, so that those that still run give up.
        on_wait: is called again and again, with the number of those that are finished.
    """
    with ThreadPoolExecutor(num_threads, "transfer") as pool:
        pending: set[Future[None]] = {pool.submit(transfer) for transfer in transfers}
        num_done = 0
        try:
            while pending:
                done, pending = wait(pending, timeout=_POLL_S, return_when="FIRST_EXCEPTION")
                num_done += len(done)
                for future in done:
                    future.result()
                on_wait(num_done)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def retry(call: Callable[[], T], stop: threading.Event) -> T:
    """Return what a call to a store returns, tried again where the store failed for now."""
    for number in range(_MAX_TRIES):
        try:
            return call()
        except Exception as error:
            is_last = number == _MAX_TRIES - 1 or isinstance(error, DpgenError) or is_lasting(error)
            if is_last or stop.wait(2.0**number):
                raise
    raise AssertionError


def _is_same(name: Path, place: Path) -> bool:
    """Return True if the two names are of one file."""
    return name.exists() and os.path.samefile(name, place)


def _is_whole(place: Path, item: StoredObject) -> bool:
    return place.exists() and item.size in (None, place.stat().st_size)


def _show(store: Store, item: StoredObject) -> str:
    return show_address(item.path if "://" in item.path else f"{store.scheme}://{item.path}")
