"""Upload a run's result: files in parallel, what is there already skipped, leftovers removed, `_SUCCESS` last.

- RUN_DIR/upload.json records each uploaded file: its size and time here, and its size and version there.
- A file `.dpgen-upload.json` in the target names the run that it belongs to. A target that holds anything else is
  refused, so that nothing is removed but what this run has uploaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpgen.config.checks import find_scheme
from dpgen.data.reading.files import list_names
from dpgen.data.storage.fetching import retry, run_transfers
from dpgen.data.storage.listing import get_relative_name
from dpgen.data.storage.store import LOCAL_SCHEMES, Store, StoredObject, call_store, open_store, show_address
from dpgen.errors import ConfigError, DpgenError, TransferStopped
from dpgen.formatting import format_bytes, format_count, format_duration
from dpgen.journal.files import atomic_write_text
from dpgen.journal.run_dir import RunDir
from dpgen.log import PeriodicLog

logger = logging.getLogger(__name__)

MARK = ".dpgen-upload.json"
RECORD = "upload.json"
_SUCCESS = "_SUCCESS"
_NUM_FILES = 4  # uploaded at a time
_NO_WAIT: Callable[[], None] = lambda: None  # noqa: E731


class ResultUpload:
    """Upload the result of one run directory to one address.

    Args:
        address: `output.to`.
        options: of its store, `output.storage_options`.
        on_wait: is called again and again while the store is at work.
    """

    def __init__(
        self, run_dir: RunDir, address: str, options: Mapping[str, Any], on_wait: Callable[[], None] = _NO_WAIT
    ) -> None:
        if find_scheme(address) in (None, *LOCAL_SCHEMES):
            address = str(Path(address.partition("://")[2] or address).expanduser().absolute())
        self._run_dir, self._address, self._options, self._on_wait = run_dir, address, options, on_wait
        self._record_lock, self._stop = threading.Lock(), threading.Event()

    def check(self) -> None:
        """Check before a model loads that the target can be listed and written, and is this run's or empty.

        Raises:
            ConfigError: it can't, or it is not.
        """
        if "://" not in self._address and self._run_dir.path.resolve() in (path := Path(self._address)).parents:
            raise ConfigError(f"output.to={path}: must not be in the run directory {self._run_dir.path}")
        store = self._open()
        run, there = call_store(store, lambda: (_read_mark(store), _list(store)), "to list it", self._on_wait)
        self._refuse_foreign(store, run, there)
        call_store(store, lambda: _probe(store), "to be written to", self._on_wait)

    def _refuse_foreign(self, store: Store, run: str | None, there: Mapping[str, StoredObject]) -> None:
        if run is not None and run != _read_record(self._run_dir).get("run"):
            raise ConfigError(
                f"{store.label} holds the result of another run directory: choose another place, or remove it there"
            )
        if run is None and there:
            raise ConfigError(
                f"{store.label} holds files that no run uploaded ({list_names(sorted(there))}): choose an empty place"
            )

    def upload(self) -> None:
        """Upload what is not there yet, remove leftovers of an earlier result, and write `_SUCCESS`.

        Raises:
            TransferStopped: the store refuses or fails. The result is complete in the run directory.
        """
        started_s, shown = time.monotonic(), show_address(self._address)
        try:
            files = {path.name: path for path in sorted(self._run_dir.dataset.iterdir()) if path.is_file()}
            files[_SUCCESS] = self._run_dir.success
            store = self._open()
            run, there = call_store(store, lambda: (_read_mark(store), _list(store)), "to list it", self._on_wait)
            self._refuse_foreign(store, run, there)  # what came there since the run began
            record = self._begin_record()
            done = {
                name for name, path in files.items() if _is_uploaded(path, record["files"].get(name), there.get(name))
            }
            own = record["files"].keys() | set(record.get("earlier", {}).get(record["place"], ()))
            leftovers = sorted((there.keys() & own) - files.keys())
            missing = [name for name in files if name not in done and name != _SUCCESS]
            if not missing and not leftovers and _SUCCESS in done:
                logger.info(f"the result is in {shown} already")
                return
            # From here on the target is incomplete, and shows it.
            call_store(store, lambda: _begin(store, record["run"], there), "to be written to", self._on_wait)
            self._put_all(store, {name: files[name] for name in missing}, record)
            call_store(store, lambda: _remove(store, leftovers), "to remove leftovers", self._on_wait)
            self._put_all(store, {_SUCCESS: files[_SUCCESS]}, record)
        except (ConfigError, TransferStopped) as error:
            raise TransferStopped(
                f"the result is complete in {self._run_dir.dataset}, but its upload stopped: {error}. The same command "
                "continues the upload"
            ) from None
        except OSError as error:
            raise DpgenError(f"{self._run_dir.dataset} can't be read: {error.strerror}") from None
        num_bytes = format_bytes(sum(files[name].stat().st_size for name in missing))
        notes = f", {format_count(len(done - {_SUCCESS}), 'file')} were there" if done - {_SUCCESS} else ""
        notes += f", {format_count(len(leftovers), 'leftover')} removed" if leftovers else ""
        duration = format_duration(time.monotonic() - started_s)
        logger.info(f"uploaded {format_count(len(missing), 'file')} ({num_bytes}) to {shown} in {duration}{notes}")

    def _open(self) -> Store:
        return open_store(self._address, self._options, "output.to")

    def _put_all(self, store: Store, files: Mapping[str, Path], record: dict[str, Any]) -> None:
        num_done = 0
        log = PeriodicLog(
            logger,
            lambda: f"uploading the result: {num_done:,} of {format_count(len(files), 'file')}",
            on_all_ranks=True,
        )

        def on_wait(number: int) -> None:
            nonlocal num_done
            num_done = number
            self._on_wait()
            log()

        self._stop = threading.Event()
        transfers = [partial(self._put, store, name, path, record) for name, path in files.items()]
        run_transfers(transfers, _NUM_FILES, self._stop, on_wait)

    def _put(self, store: Store, name: str, path: Path, record: dict[str, Any]) -> None:
        target, stat, stop = f"{store.path.rstrip('/')}/{name}", path.stat(), self._stop
        try:
            put_file(store, path, target, stop)
            found = retry(lambda: store.find(target), stop)
        except DpgenError:
            raise
        except Exception as error:  # noqa: BLE001 - each store's package has errors of its own
            raise TransferStopped(store.describe_error(error, f"{show_address(self._address)}/{name}")) from None
        if found is None or found.size not in (None, stat.st_size):
            there = "nothing" if found is None else f"{found.size:,} bytes"
            raise TransferStopped(f"{store.label}: {name} has {stat.st_size:,} bytes here, and {there} there")
        with self._record_lock:
            record["files"][name] = [stat.st_size, stat.st_mtime_ns, found.size, found.version]
            self._write_record(record)

    # ---- RUN_DIR/upload.json

    def _begin_record(self) -> dict[str, Any]:
        record = _read_record(self._run_dir)
        place = hashlib.blake2b(self._address.encode(), digest_size=16).hexdigest()
        if record.get("place") != place:
            earlier = dict(record.get("earlier", {}))  # names that this run has uploaded elsewhere
            if "place" in record:
                earlier[record["place"]] = sorted({*earlier.get(record["place"], ()), *record["files"]})
            shown = show_address(self._address)
            record = {**record, "place": place, "to": shown, "files": {}, "earlier": earlier}
        record.setdefault("run", uuid.uuid4().hex)
        self._write_record(record)
        return record

    def _write_record(self, record: Mapping[str, Any]) -> None:
        atomic_write_text(self._run_dir.path / RECORD, json.dumps(record, indent=2) + "\n")


def describe_unfinished_upload(run_dir: RunDir) -> str | None:
    """Return that an upload has begun and is not finished, and what to do; None if there is none."""
    record = _read_record(run_dir)
    try:
        success = run_dir.success.stat()
    except OSError:
        return None
    if not record or record["files"].get(_SUCCESS, [])[:2] == [success.st_size, success.st_mtime_ns]:
        return None
    return f"the result is not in {record.get('to')} yet: run the same command again, which continues the upload"


def _read_record(run_dir: RunDir) -> dict[str, Any]:
    try:
        record = json.loads((run_dir.path / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else {}


def put_file(store: Store, path: Path, target: str, stop: threading.Event) -> None:
    """Write a file to a store, and try again where the store fails for now. Raises the store's own errors."""
    options = {"method": "put"} if store.scheme in ("http", "https") else {}
    retry(lambda: store.file_system.put_file(str(path), target, **options), stop)


def upload_file(path: Path, address: str, options: Mapping[str, Any], on_wait: Callable[[], None] = _NO_WAIT) -> None:
    """Write one file to an address; a web server gets it by PUT.

    Raises:
        TransferStopped: the store refuses or fails.
    """
    store, stop = open_store(address, options, "-o"), threading.Event()
    try:
        log = PeriodicLog(logger, lambda: f"uploading to {show_address(address)}", on_all_ranks=True)

        def wait_and_log(_: int) -> None:
            on_wait()
            log()

        run_transfers([partial(put_file, store, path, store.path, stop)], 1, stop, wait_and_log)
    except DpgenError:
        raise
    except Exception as error:  # noqa: BLE001 - each store's package has errors of its own
        raise TransferStopped(
            f"the responses are complete in {path}, but their upload stopped: {store.describe_error(error)}. The same "
            "command tries again"
        ) from None


def check_file_target(address: str, options: Mapping[str, Any]) -> None:
    """Check that the folder of an address can be written; a web server is not asked, since a probe would be the file.

    Raises:
        ConfigError: it can't; or the address names a folder.
    """
    store = open_store(address, options, "-o")
    if store.scheme in ("http", "https"):
        return
    if address.endswith("/"):
        raise ConfigError(f"{store.label}: is a folder: must be a file")
    folder = Store(address, store.file_system, store.path.rpartition("/")[0], "-o")
    call_store(folder, lambda: _probe(folder), "to be written to")


def _is_uploaded(path: Path, recorded: Iterable[Any] | None, there: StoredObject | None) -> bool:
    if recorded is None or there is None:
        return False
    stat = path.stat()
    return list(recorded) == [stat.st_size, stat.st_mtime_ns, there.size, there.version]


def _list(store: Store) -> dict[str, StoredObject]:
    """Return the objects of a target by their names, but for dpgen's own mark and probes."""
    names = {get_relative_name(store.path, item): item for item in store.list_below(store.path)}
    return {name: item for name, item in names.items() if name != MARK and not name.startswith(".dpgen-probe-")}


def _read_mark(store: Store) -> str | None:
    """Return which run a target belongs to; None if it bears no mark."""
    store.file_system.invalidate_cache()
    try:
        mark = json.loads(store.file_system.cat_file(f"{store.path.rstrip('/')}/{MARK}"))
    except FileNotFoundError:
        return None
    except ValueError:
        return ""
    return str(mark.get("run")) if isinstance(mark, dict) else ""


def _begin(store: Store, run: str, there: Iterable[str]) -> None:
    """Take `_SUCCESS` away and write the mark."""
    with contextlib.suppress(FileNotFoundError):
        if _SUCCESS in there:
            store.file_system.rm_file(f"{store.path.rstrip('/')}/{_SUCCESS}")
    _write(store, MARK, json.dumps({"run": run}).encode())


def _remove(store: Store, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            store.file_system.rm_file(f"{store.path.rstrip('/')}/{name}")


def _probe(store: Store) -> None:
    """Write a tiny object and remove it."""
    name = f".dpgen-probe-{uuid.uuid4().hex}"
    _write(store, name, b"dpgen checks that it can write here\n")
    store.file_system.rm_file(f"{store.path.rstrip('/')}/{name}")


def _write(store: Store, name: str, content: bytes) -> None:
    if store.scheme in LOCAL_SCHEMES:
        store.file_system.makedirs(store.path, exist_ok=True)
    store.file_system.pipe_file(f"{store.path.rstrip('/')}/{name}", content)
