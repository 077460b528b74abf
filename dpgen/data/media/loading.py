"""Load the contents of a medium: read a file, decode a data: URL, or fetch a URL. Blocks; runs in a worker process."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from dpgen.data.media.parts import (
    INVALID,
    MISSING,
    NOT_ALLOWED,
    TOO_LARGE,
    MediaPart,
    is_data_url,
    is_http_url,
    shorten,
)
from dpgen.data.media.policy import MediaPolicy
from dpgen.errors import RowRefused
from dpgen.formatting import format_bytes

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BLANKS = b" \t\r\n\f\v"


def load_media(part: MediaPart, policy: MediaPolicy) -> bytes:
    """Return the contents of a medium's file.

    Raises:
        RowRefused: `media_missing`, `media_invalid`, `media_too_large`, `media_not_allowed`, `media_fetch_failed`.
    """
    data = part.data
    if data is None:
        assert part.source is not None, "placeholders are filled before a row is sent off"
        try:
            data = _load_source(part.where, part.source.strip(), policy)
        except ValueError:  # of the functions that take URLs apart, and encode names of files
            raise RowRefused(MISSING, f"{part.where}: {shorten(part.source)!a} is no path and no URL") from None
    if len(data) > policy.max_bytes:
        raise make_size_error(part.where, len(data), policy)
    if not data:
        raise RowRefused(INVALID, f"{part.where}: the {part.kind} has 0 bytes")
    return data


def make_size_error(where: str, num_bytes: int | None, policy: MediaPolicy) -> RowRefused:
    """Return the error of a medium that is too large; `num_bytes` None where it is not known how large."""
    size = "more bytes" if num_bytes is None else format_bytes(num_bytes)
    return RowRefused(TOO_LARGE, f"{where}: {size}, data.max_media_bytes={policy.max_bytes}")


def _load_source(where: str, source: str, policy: MediaPolicy) -> bytes:
    if is_data_url(source):
        return _decode_data_url(where, source, policy)
    if is_http_url(source):
        from dpgen.data.media.fetching import fetch

        return fetch(where, source, policy)
    if source[:5].lower() == "file:":
        source = unquote(urlsplit(source).path)
    elif scheme := _SCHEME.match(source):
        raise RowRefused(NOT_ALLOWED, f"{where}: {scheme[0]} URLs can't be read: only paths, data:, http: and https:")
    return _read_file(where, source, policy)


def _decode_data_url(where: str, url: str, policy: MediaPolicy) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise RowRefused(INVALID, f"{where}: the data: URL has no comma, so no contents")
    is_base64 = header.rpartition(";")[2].strip().lower() == "base64"
    if len(payload) * (3 if is_base64 else 1) > policy.max_bytes * (4 if is_base64 else 3) + 1024:
        raise make_size_error(where, len(payload) * 3 // 4, policy)
    try:
        if not is_base64:
            return unquote_to_bytes(payload)
        plain = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        return base64.b64decode(plain.translate(None, _BLANKS), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowRefused(INVALID, f"{where}: the data: URL is no base64: {error}") from None


def _read_file(where: str, path: str, policy: MediaPolicy) -> bytes:
    """Return the contents of a file below one of the policy's folders, links followed."""
    found = _find_file(where, path, policy)
    try:
        # A pipe would wait for its writer, and a device may never end.
        descriptor = os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RowRefused(INVALID, f"{where}: {shorten(path)} is no file")
            if status.st_size > policy.max_bytes:
                raise make_size_error(f"{where}: {shorten(path)}", status.st_size, policy)
            return stream.read(policy.max_bytes + 1)
    except OSError as error:
        raise _make_file_error(where, path, error) from None


def _find_file(where: str, path: str, policy: MediaPolicy) -> str:
    """Return the real path of a file.

    Raises:
        RowRefused: `media_missing`, `media_not_allowed`.
    """
    if not policy.roots:
        raise RowRefused(NOT_ALLOWED, f"{where}: {shorten(path)} is a path: set data.media_dir, the folder it is in")
    if not path or "\0" in path:
        raise RowRefused(MISSING, f"{where}: {path!r} is no path")
    roots, is_below = policy.roots, False
    real_roots = [os.path.realpath(root) for root in roots]
    for root in roots:
        real = os.path.realpath(os.path.join(root, path))
        if any(os.path.commonpath([real_root, real]) == real_root for real_root in real_roots):
            is_below = True
            if os.path.lexists(real):
                return real
    if is_below:
        below = roots[0] if len(roots) == 1 else f"{roots[0]} and {len(roots) - 1} more"
        raise RowRefused(MISSING, f"{where}: no such file: {shorten(path)} (below {below}; data.media_dir sets that)")
    raise RowRefused(
        NOT_ALLOWED,
        f"{where}: {shorten(path)} is outside of {roots[0]}, and nothing else is read: set data.media_dir to a folder "
        "that it is in",
    )


def _make_file_error(where: str, path: str, error: OSError) -> RowRefused:
    kind = MISSING if isinstance(error, FileNotFoundError | NotADirectoryError) else INVALID
    return RowRefused(kind, f"{where}: {shorten(path)} can't be read: {error.strerror or error}")
