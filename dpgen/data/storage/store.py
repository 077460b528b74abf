"""Open the store behind an address, and call it with a limit on the time and with errors in the user's words.

- A call that the store doesn't answer is given up after `CALL_LIMIT_S`; meanwhile the log says what is waited for.
- An address may hold secrets (a signed query, a password). Messages name it by `show_address`.
- The home of fsspec.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from dpgen.config.checks import find_scheme
from dpgen.config.secrets import REMOVED, redact_text
from dpgen.data.storage.store_errors import explain_store_error
from dpgen.errors import ConfigError, suggest_name
from dpgen.formatting import format_extra
from dpgen.log import PeriodicLog

logger = logging.getLogger(__name__)

T = TypeVar("T")

CALL_LIMIT_S = 600.0  # a million objects take minutes to list
LOCAL_SCHEMES = ("file", "local")
WEB_SCHEMES = ("http", "https")
_POLL_S = 0.5
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 10.0, 60.0
_S3_ATTEMPTS = 3
_COMMON_SCHEMES: tuple[str, ...] = (
    "s3",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "adl",
    "hf",
    "http",
    "https",
    "file",
    "memory",
    "ftp",
)
_COMMON_SCHEMES += ("sftp", "hdfs", "oci", "oss", "webdav", "dbfs", "smb")
# Parts of what a store says about an object: the first one tells its contents apart from earlier ones.
_VERSIONS: tuple[str, ...] = (
    "ETag",
    "etag",
    "sha256",
    "md5Hash",
    "Content-MD5",
    "blob_id",
    "generation",
    "Last-Modified",
)
_VERSIONS += ("LastModified", "last_modified", "mtime", "updated", "created")
# By the package that a store needs: the extra that installs it.
_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}


@dataclass(frozen=True)
class StoredObject:
    """Describe an object as its store lists it.

    Attributes:
        path: in the store; for http the whole address.
        size: in bytes; None if the store doesn't say.
        version: what changes with the content; None if the store doesn't say.
        is_ranged: whether a part of it can be read.
    """

    path: str
    size: int | None
    version: str | None
    is_ranged: bool = True


class Store:
    """Give access to the objects below one address. Each method may block for as long as the store does.

    Attributes:
        address: as the user wrote it; it may hold secrets.
        file_system: fsspec's.
        path: the address's place in it.
        key: what the user calls the address: "data.path", "output.to" or "-o".
    """

    def __init__(self, address: str, file_system: Any, path: str, key: str) -> None:
        self.address, self.file_system, self.path, self.key = address, file_system, path, key

    @property
    def label(self) -> str:
        """Return what errors begin with."""
        return _make_label(self.key, self.address)

    @property
    def scheme(self) -> str:
        return find_scheme(self.address) or "file"

    @property
    def endpoint(self) -> str:
        """Return which server is asked, without secrets; "" for the usual one."""
        options = self.file_system.storage_options
        client_options = options.get("client_kwargs") or {}
        named = options.get("endpoint_url") or options.get("account_name") or client_options.get("endpoint_url")
        variable = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return show_address(str(named or (variable if self.scheme.startswith("s3") else "") or ""))

    def describe_error(self, error: BaseException, address: str | None = None) -> str:
        """Return in one line what was wrong with an address, and what to do.

        Args:
            address: the object's; by default the store's.
        """
        label = show_address(address) if address else self.label
        return f"{label}: {explain_store_error(self.scheme, error, _find_options_key(self.key))}"

    def find(self, path: str) -> StoredObject | None:
        """Return an object; None if there is none of that name, which a web server reports as an error."""
        try:
            facts = self.file_system.info(path)
        except FileNotFoundError:
            if self.scheme in WEB_SCHEMES:
                raise
            return None
        return None if facts.get("type") == "directory" else to_object(facts)

    def list_below(self, path: str) -> list[StoredObject]:
        """Return all objects below a folder, by path; none if there is no folder."""
        self.file_system.invalidate_cache()
        try:
            found = self.file_system.find(path, detail=True)
        except FileNotFoundError as error:
            if "bucket" in str(error):
                raise
            return []
        return sorted(
            (to_object(facts) for facts in found.values() if not str(facts["name"]).endswith("/")),
            key=lambda item: item.path,
        )


def open_store(address: str, options: Mapping[str, Any], key: str = "data.path") -> Store:
    """Return the store of an address. It is not asked anything yet.

    Args:
        options: of fsspec.
        key: what the user calls the address.

    Raises:
        ConfigError: no store has such addresses, its package is not installed, or its options are wrong.
    """
    import fsspec
    from fsspec.registry import known_implementations

    scheme, label, options_key = find_scheme(address), _make_label(key, address), _find_options_key(key)
    if "::" in address:
        raise ConfigError(f"{label}: chained addresses are not read; name the store's own address, without '::'")
    if scheme is not None and scheme not in fsspec.available_protocols():
        names = [name for name in fsspec.available_protocols() if name in _COMMON_SCHEMES]
        raise ConfigError(f"{label}: there is no store {scheme}://{suggest_name(scheme, names, 'stores')}")
    try:
        file_system, path = fsspec.url_to_fs(address, **_add_defaults(scheme or "file", address, options))
    except ImportError as error:
        text = f"{known_implementations.get(scheme or '', {}).get('err', '')} {error}"
        extra = next((extra for package, extra in _EXTRAS.items() if package in text), None)
        advice = format_extra(extra) if extra else str(error).splitlines()[0]
        raise ConfigError(f"{label}: the package for {scheme}:// is not installed: {advice}") from None
    except TypeError as error:
        raise ConfigError(f"{options_key}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # noqa: BLE001 - each store's package has errors of its own
        raise ConfigError(f"{label}: {explain_store_error(scheme or 'file', error, options_key)}") from None
    return Store(address, file_system, str(path), key)


def call_store(store: Store, action: Callable[[], T], what: str, on_wait: Callable[[], None] = lambda: None) -> T:
    """Return what `action` returns. It runs in a thread, and `on_wait` is called while it does.

    Args:
        what: what is done, for the log: "to list it".

    Raises:
        ConfigError: the store refuses, or has no answer.
    """
    shown, answers = show_address(store.address), queue.SimpleQueue[Any]()
    log = PeriodicLog(logger, lambda: f"waiting for {shown} {what}", on_all_ranks=True)

    def run() -> None:
        try:
            answers.put((action(), None))
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            answers.put((None, error))

    # A daemon: a store that never answers must not keep the process from ending.
    threading.Thread(target=run, name="store-call", daemon=True).start()
    waited_s = 0.0
    while True:
        try:
            value, error = answers.get(timeout=_POLL_S)
            break
        except queue.Empty:
            waited_s += _POLL_S
        on_wait()
        log()
        if waited_s >= CALL_LIMIT_S:
            raise ConfigError(
                f"{store.label}: the store has not answered for {CALL_LIMIT_S:g} s; is it reachable from here?"
            )
    if isinstance(error, (ConfigError, KeyboardInterrupt)):
        raise error
    if error is not None:
        raise ConfigError(store.describe_error(error)) from None
    answer: T = value
    return answer


def _make_label(key: str, address: str) -> str:
    return f"{key} {show_address(address)}" if key.startswith("-") else f"{key}={show_address(address)}"


def _find_options_key(key: str) -> str:
    return "data.storage_options" if key == "data.path" else "output.storage_options"


def to_object(facts: Mapping[str, Any]) -> StoredObject:
    """Return an object as fsspec describes it."""
    lfs = facts.get("lfs")  # of the Hub
    known = {**facts, **({"sha256": getattr(lfs, "sha256", None)} if lfs is not None else {})}
    version = next((f"{name} {_to_text(known[name])}" for name in _VERSIONS if known.get(name)), None)
    return StoredObject(str(facts["name"]), facts.get("size"), version, bool(facts.get("partial", True)))


def _to_text(version: Any) -> str:
    """Return a version as text: stores give the same time in several forms."""
    time = version.timestamp() if isinstance(version, datetime) else version
    return f"{time:.6f}" if isinstance(time, float) else str(time)


def show_address(address: str) -> str:
    """Return an address for messages: without a password, and without the query, which may hold a signature."""
    address = redact_text(re.sub(r"(?<=://)[^/?#]*@", "", address))
    if find_scheme(address) in WEB_SCHEMES:
        address, mark, _ = address.partition("?")
        return f"{address}?..." if mark else address
    return address


def _drop_removed(value: Any) -> Any:
    """Return options without those that were secrets, so that the store's package looks for them elsewhere."""
    if not isinstance(value, Mapping):
        return value
    return {name: _drop_removed(item) for name, item in value.items() if item != REMOVED}


def _add_defaults(scheme: str, address: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a store's options, with limits on the time where its package has none, or long ones."""
    options = {name: _drop_removed(value) for name, value in options.items() if value != REMOVED}  # of a config.yaml
    if scheme in ("s3", "s3a"):
        defaults = {"connect_timeout": _CONNECT_TIMEOUT_S, "read_timeout": _READ_TIMEOUT_S}
        retries = {"retries": {"max_attempts": _S3_ATTEMPTS, "mode": "standard"}}
        options["config_kwargs"] = {**defaults, **retries, **(options.get("config_kwargs") or {})}
    if scheme in WEB_SCHEMES:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True, **(options.get("client_kwargs") or {})}
        if "%" in address:  # written as the server signed it
            options.setdefault("encoded", True)
    return options
