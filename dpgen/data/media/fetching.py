"""Fetch media over HTTP: from hosts that the configuration lists, and never from an address that is not public.

- A name is looked up here, and the connection goes to an address that was checked: what DNS says the next time is no
  matter. Redirects are followed one by one, and each is checked in the same way. No proxy is used.
- One clock runs for all of it: a thread closes the socket when the time is over, whatever it waits for. Only
  the look-up of a name has the system's own limit.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from dpgen.data.media.loading import make_size_error
from dpgen.data.media.parts import FETCH_FAILED, NOT_ALLOWED, shorten
from dpgen.data.media.policy import MediaPolicy
from dpgen.errors import RowRefused

if TYPE_CHECKING:
    import urllib3
    from urllib3.util import Url

AddressCheck = Callable[[str], bool]

_MAX_REDIRECTS = 5
_MAX_TRIES = 3
_RETRY_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_REDIRECT_STATUSES = {301, 302, 303, 307, 308}
_FIRST_PAUSE_S = 0.5
_CHUNK_BYTES = 1 << 16
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HEADERS = {"User-Agent": "dpgen", "Accept": "*/*", "Accept-Encoding": "identity"}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Networks that Python 3.11 takes for public: NAT64 of a site, addresses of a site as they were before fc00::/7, those
# that IANA keeps for protocols (a cloud's metadata are at 192.0.0.192) and for documentation, relays of 6to4, and the
# address at which each virtual machine of Azure reaches its host.
_LOCAL_NETWORKS = [
    ipaddress.ip_network(text)
    for text in ("64:ff9b:1::/48", "fec0::/10", "192.0.0.0/24", "3fff::/20", "192.88.99.0/24", "168.63.129.16")
]


def fetch(where: str, url: str, policy: MediaPolicy, is_allowed_address: AddressCheck | None = None) -> bytes:
    """Return what a URL holds, in at most `policy.fetch_timeout_s` and `policy.max_bytes`.

    Args:
        where: the medium's place in its row, for messages.
        is_allowed_address: decides which addresses are connected to; None for `is_public_address`.

    Raises:
        RowRefused: `media_not_allowed`, `media_fetch_failed`, `media_too_large`.
    """
    return _Fetch(where, policy, is_allowed_address or is_public_address).run(url)


def is_public_address(address: str) -> bool:
    """Return True if an IP address belongs to the public Internet, and so do IPv4 addresses that it stands for."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if any(parsed in network for network in _LOCAL_NETWORKS):
        return False
    if not parsed.is_global or parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified:
        return parsed in _NAT64 and is_public_address(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    if isinstance(parsed, ipaddress.IPv4Address):
        return True
    hidden = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
    if parsed in _NAT64:
        hidden.append(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
    return all(inner is None or is_public_address(str(inner)) for inner in hidden)


class _Fetch:
    """Fetch one URL.

    Attributes:
        deadline: by `time.monotonic`.
    """

    def __init__(self, where: str, policy: MediaPolicy, is_allowed_address: AddressCheck) -> None:
        self._where, self._policy, self._is_allowed_address = where, policy, is_allowed_address
        self.deadline = time.monotonic() + policy.fetch_timeout_s
        self._is_over = threading.Event()

    def run(self, url: str) -> bytes:
        import urllib3

        pause_s = _FIRST_PAUSE_S
        for number in range(_MAX_TRIES):
            try:
                return self._follow(url)
            except _Retry as retry:
                reason = str(retry)
            except (urllib3.exceptions.HTTPError, HTTPException, OSError) as error:
                reason = _describe_error(error)
            if self._remaining_s <= pause_s:
                reason = reason if not self._is_over.is_set() else self._describe_timeout()
                break
            if number + 1 < _MAX_TRIES:
                time.sleep(pause_s)
                pause_s *= 2
        raise self._make_error(url, reason)

    @property
    def _remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    def _follow(self, url: str) -> bytes:
        """Return what a URL holds, redirects followed."""
        target = url
        for _ in range(_MAX_REDIRECTS + 1):
            parsed = self._check_url(target)
            with _Connection(parsed, self._connect, self._remaining_s) as connection:
                clock = threading.Timer(max(0.0, self._remaining_s), self._stop, [connection])
                clock.daemon = True
                clock.start()
                try:
                    response = connection.request(parsed)
                    if response.status not in _REDIRECT_STATUSES:
                        return self._read(url, response)
                    location = response.headers.get("Location")
                finally:
                    clock.cancel()
            if not location:
                raise self._make_error(url, f"HTTP {response.status} without a place to go on to")
            target = urljoin(target, location)
        raise self._make_error(url, f"more than {_MAX_REDIRECTS} redirects")

    def _read(self, url: str, response: urllib3.BaseHTTPResponse) -> bytes:
        if response.status != 200:
            reason = f"HTTP {response.status}"
            if response.status in _RETRY_STATUSES:
                raise _Retry(reason)
            raise self._make_error(url, reason)
        limit, length = self._policy.max_bytes, response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > limit:
            raise make_size_error(f"{self._where}: {shorten(url)}", int(length), self._policy)
        chunks, num_bytes = [], 0
        while chunk := response.read(_CHUNK_BYTES, decode_content=False):
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise make_size_error(f"{self._where}: {shorten(url)}", None, self._policy)
            chunks.append(chunk)
        if self._is_over.is_set():
            raise self._make_error(url, self._describe_timeout())
        return b"".join(chunks)

    def _check_url(self, url: str) -> Url:
        """Return a URL in its parts, after checking that its host is listed."""
        from urllib3.exceptions import LocationParseError
        from urllib3.util import parse_url

        try:
            parsed = parse_url(url)
        except LocationParseError:
            raise RowRefused(NOT_ALLOWED, f"{self._where}: {shorten(url)} is no URL") from None
        host, port = (parsed.host or "").lower().rstrip("."), parsed.port or _DEFAULT_PORTS.get(parsed.scheme or "")
        if parsed.scheme not in _DEFAULT_PORTS or not host:
            raise RowRefused(NOT_ALLOWED, f"{self._where}: {shorten(url)} is no http: or https: URL")
        if parsed.auth is not None:
            raise RowRefused(NOT_ALLOWED, f"{self._where}: a URL with a user's name or password is not fetched")
        if not any(_matches(host, port, parsed.scheme, listed) for listed in self._policy.fetch_hosts):
            name = host if port == _DEFAULT_PORTS[parsed.scheme] else f"{host}:{port}"
            raise RowRefused(
                NOT_ALLOWED, f"{self._where}: {name} is not listed in data.fetch_urls: {shorten(url)} is not fetched"
            )
        return parsed

    def _connect(self, host: str, port: int) -> socket.socket:
        """Return a connection to an address of a host, each of them checked before it is tried."""
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise OSError(f"the host {host} is not found: {getattr(error, 'strerror', None) or error}") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        allowed = [address for address in addresses if self._is_allowed_address(address)]
        if not allowed:
            raise RowRefused(
                NOT_ALLOWED,
                f"{self._where}: {host} is {', '.join(addresses)}, in a private or reserved network, which is never "
                "fetched from",
            )
        last_error: OSError | None = None
        for address in allowed:
            try:
                return socket.create_connection((address, port), timeout=max(0.01, self._remaining_s))
            except OSError as error:
                last_error = error
        assert last_error is not None
        raise last_error

    def _stop(self, connection: _Connection) -> None:
        self._is_over.set()
        connection.shut_down()

    def _describe_timeout(self) -> str:
        return f"not done after data.fetch_timeout_s={self._policy.fetch_timeout_s:g}"

    def _make_error(self, url: str, reason: str) -> RowRefused:
        return RowRefused(FETCH_FAILED, f"{self._where}: {shorten(url)} can't be fetched: {reason}")


class _Connection:
    """Hold a connection of urllib3 whose socket comes from `connect`; TLS checks the certificate for the URL's host."""

    def __init__(self, url: Url, connect: Callable[[str, int], socket.socket], timeout_s: float) -> None:
        from urllib3.connection import HTTPConnection, HTTPSConnection

        base: Any = HTTPSConnection if url.scheme == "https" else HTTPConnection
        owner = self

        class Connection(base):  # type: ignore[misc]
            """Connect where it is told to."""

            def _new_conn(self) -> socket.socket:
                connected = connect(self.host, self.port)
                owner._handle = connected.dup()  # the socket itself passes into the one for TLS
                return connected

        self._handle: socket.socket | None = None
        self._connection = Connection(
            (url.host or "").strip("[]"), url.port or base.default_port, timeout=max(0.01, timeout_s)
        )

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        if self._handle is not None:
            self._handle.close()

    def request(self, url: Url) -> urllib3.BaseHTTPResponse:
        """Return the answer to a GET, of which the body is not read yet."""
        self._connection.request("GET", url.request_uri, headers=_HEADERS, preload_content=False)
        response: urllib3.BaseHTTPResponse = self._connection.getresponse()
        return response

    def shut_down(self) -> None:
        """Wake up whoever waits for the socket. For another thread."""
        if self._handle is not None:
            with suppress(OSError):
                self._handle.shutdown(socket.SHUT_RDWR)


class _Retry(Exception):
    """An answer that may be another one soon."""


def _matches(host: str, port: int | None, scheme: str, listed: str) -> bool:
    """Return True if an entry of `data.fetch_urls` allows a host."""
    name, _, listed_port = listed.partition(":") if listed.count(":") == 1 else (listed, "", "")
    if int(listed_port or _DEFAULT_PORTS[scheme]) != port:
        return False
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


def _describe_error(error: Exception) -> str:
    import ssl

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    text = str(cause or error).strip() or type(error).__name__
    return text.splitlines()[0]
