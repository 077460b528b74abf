"""Test that URLs are fetched from listed hosts alone, never from a private address, and within limits."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from dpgen.data.media import fetching
from dpgen.data.media.fetching import fetch, is_public_address
from dpgen.data.media.loading import load_media
from dpgen.data.media.parts import MediaPart
from dpgen.data.media.policy import MediaPolicy
from dpgen.errors import RowRefused

CONTENT = b"\x89PNG of the server"
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Answer requests on a port of this machine, by path.

    Attributes:
        paths: of the requests so far.
    """

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.paths: list[str] = []
        self.is_closing = threading.Event()
        paths, owner = self.paths, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append(self.path)
                self.closing = owner.is_closing
                answers[self.path](self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True)
        self._thread.start()

    def use_tls(self, context: ssl.SSLContext) -> None:
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def close(self) -> None:
        self.is_closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serve(**answers: Answer) -> Iterator[Server]:
    server = Server({f"/{name}": answer for name, answer in answers.items()})
    try:
        yield server
    finally:
        server.close()


def send(body: bytes = CONTENT, status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def drip(*, in_headers: bool) -> Answer:
    """Return an answer that goes on forever, a byte at a time."""

    def answer(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X-Slow: " if in_headers else b"\r\n"))
        try:
            while not handler.closing.wait(0.02):
                handler.wfile.write(b"a")
        except OSError:
            pass

    return answer


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Return the addresses by name that the resolver knows, to be changed; and let no pause last."""
    known = {"images.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        try:
            found = [host] if ipaddress_or_none(host) else known[host]
        except KeyError:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(fetching, "_FIRST_PAUSE_S", 0.001)
    return known


def ipaddress_or_none(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        return False
    return True


def make_policy(*hosts: str, **limits: Any) -> MediaPolicy:
    return MediaPolicy(fetch_hosts=hosts, **{"fetch_timeout_s": 20.0, **limits})


def get(url: str, policy: MediaPolicy, *, allows_loopback: bool = True) -> bytes:
    """Fetch a URL; the test's server is on this machine, which only tests allow."""
    check = (lambda address: address == "127.0.0.1") if allows_loopback else None
    return fetch("images", url, policy, check)


def reject(url: str, policy: MediaPolicy, **keys: Any) -> tuple[str, str]:
    with pytest.raises(RowRefused) as raised:
        get(url, policy, **keys)
    assert raised.value.message.startswith("images: ")
    return raised.value.type, raised.value.message.removeprefix("images: ")


def test_a_listed_host_is_fetched_from() -> None:
    with serve(a=send()) as server:
        policy = make_policy(f"images.test:{server.port}", f"*.images.test:{server.port}")
        assert get(f"http://images.test:{server.port}/a", policy) == CONTENT
        assert get(f"HTTP://IMAGES.test:{server.port}/a#part", policy) == CONTENT
        assert server.paths == ["/a", "/a"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://other.test/a", "other.test is not listed in data.fetch_urls: http://other.test/a is not fetched"),
        ("http://images.test:81/a", "images.test:81 is not listed"),
        ("https://images.test:80/a", "images.test:80 is not listed"),
        ("http://images.test.evil.test/a", "images.test.evil.test is not listed"),
        ("http://evilimages.test/a", "evilimages.test is not listed"),
        ("http://images.test@evil.test/a", "a user's name or password"),
        ("http://evil.test\\@images.test/a", "not listed"),
        ("http://evil.test/images.test", "evil.test is not listed"),
        ("http://127.0.0.1/a", "127.0.0.1 is not listed"),
        ("http://[::1]/a", "is not listed"),
        ("http://2130706433/a", "2130706433 is not listed"),
        ("http:///a", "no http: or https: URL"),
        ("http://", "no http: or https: URL"),
    ],
)
def test_other_hosts_are_not_even_looked_up(url: str, words: str, names: dict[str, list[str]]) -> None:
    names.clear()
    type, message = reject(url, make_policy("images.test", "*.sub.test"))
    assert type == "media_not_allowed"
    assert words in message


def test_a_url_is_an_error_that_names_the_key_where_none_is_listed() -> None:
    with pytest.raises(RowRefused, match=r"x.org is not listed in data.fetch_urls") as raised:
        load_media(MediaPart("image", "images", source="https://x.org/a.png"), MediaPolicy())
    assert raised.value.type == "media_not_allowed"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::", "64:ff9b::7f00:1"),
        *("192.0.0.192", "::ffff:192.0.0.192", "64:ff9b::c000:c0", "192.88.99.1", "3fff::1", "168.63.129.16"),
        *("64:ff9b::a00:1", "64:ff9b:1::a00:1", "fec0::1", "2001:0:a00:1::f5ff:fffe", "::7f00:1"),
    ],
)
def test_a_private_or_reserved_address_is_never_connected_to(
    address: str, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_public_address(address)
    names["images.test"] = [address]
    monkeypatch.setattr(fetching.socket, "create_connection", lambda *_, **__: pytest.fail("it was connected to"))
    type, message = reject("https://images.test/a", make_policy("images.test"), allows_loopback=False)
    assert type == "media_not_allowed"
    assert message.startswith(f"images.test is {address}, in a private or reserved network")


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public_address(address)


def test_a_server_on_this_machine_is_refused_by_default() -> None:
    with serve(a=send()) as server:
        url = f"http://images.test:{server.port}/a"
        assert reject(url, make_policy(f"images.test:{server.port}"), allows_loopback=False)[0] == "media_not_allowed"
        with pytest.raises(RowRefused, match="private or reserved network"):
            load_media(MediaPart("image", "images", source=url), make_policy(f"images.test:{server.port}"))
        assert server.paths == []


def test_of_several_addresses_only_public_ones_are_tried(names: dict[str, list[str]]) -> None:
    names["images.test"] = ["10.0.0.1", "169.254.169.254", "127.0.0.1"]
    with serve(a=send()) as server:
        assert get(f"http://images.test:{server.port}/a", make_policy(f"images.test:{server.port}")) == CONTENT


def test_redirects_are_followed_to_listed_hosts_only() -> None:
    with serve(end=send()) as server:
        port = server.port
        answers = {
            "near": send(b"", 302, Location="/end"),
            "other": send(b"", 301, Location=f"http://other.test:{port}/end"),
            "evil": send(b"", 307, Location="http://evil.test/end"),
            "metadata": send(b"", 302, Location="http://169.254.169.254/latest"),
            "file": send(b"", 302, Location="file:///etc/passwd"),
            "round": send(b"", 302, Location="/round"),
            "nowhere": send(b"", 302),
        }
        with serve(**answers, end=send()) as first:
            policy = make_policy(f"images.test:{first.port}", f"other.test:{port}", "169.254.169.254")
            base = f"http://images.test:{first.port}"
            assert get(f"{base}/near", policy) == CONTENT
            assert get(f"{base}/other", policy) == CONTENT
            assert reject(f"{base}/evil", policy)[1].startswith("evil.test is not listed")
            assert reject(f"{base}/metadata", policy)[1].startswith("169.254.169.254 is 169.254.169.254, in a private")
            assert reject(f"{base}/file", policy)[0] == "media_not_allowed"
            assert reject(f"{base}/round", policy) == (
                "media_fetch_failed",
                f"{base}/round can't be fetched: more than 5 redirects",
            )
            assert reject(f"{base}/nowhere", policy)[0] == "media_fetch_failed"


def test_a_host_whose_address_becomes_private_on_the_way_is_refused(names: dict[str, list[str]]) -> None:
    def turn(handler: BaseHTTPRequestHandler) -> None:
        names["images.test"] = ["10.0.0.1"]
        send(b"", 302, Location="/end")(handler)

    with serve(start=turn, end=send()) as server:
        url = f"http://images.test:{server.port}/start"
        assert reject(url, make_policy(f"images.test:{server.port}"))[0] == "media_not_allowed"
        assert server.paths == ["/start"]


@pytest.mark.parametrize("headers", [{}, {"Content_Length": str(10_000)}])
def test_a_huge_answer_is_read_no_further_than_the_limit(headers: dict[str, str]) -> None:
    with serve(a=send(b"x" * 10_000, **headers)) as server:
        policy = make_policy(f"images.test:{server.port}", max_bytes=5_000)
        type, message = reject(f"http://images.test:{server.port}/a", policy)
        assert type == "media_too_large"
        assert message.endswith("data.max_media_bytes=5000")
        assert get(f"http://images.test:{server.port}/a", make_policy(f"images.test:{server.port}")) == b"x" * 10_000


@pytest.mark.parametrize("in_headers", [True, False])
def test_a_server_that_never_ends_costs_the_time_limit(in_headers: bool) -> None:
    with serve(a=drip(in_headers=in_headers)) as server:
        started_s = time.monotonic()
        policy = make_policy(f"images.test:{server.port}", fetch_timeout_s=0.3)
        type, message = reject(f"http://images.test:{server.port}/a", policy)
        assert type == "media_fetch_failed"
        assert message.endswith("can't be fetched: not done after data.fetch_timeout_s=0.3")
        assert time.monotonic() - started_s < 15, "the server would go on for ever"


def test_what_may_be_better_soon_is_tried_again_and_the_rest_is_not() -> None:
    left = [503, 429]

    def recover(handler: BaseHTTPRequestHandler) -> None:
        send(CONTENT, left.pop() if left else 200)(handler)

    with serve(a=recover, down=send(status=503), gone=send(status=404)) as server:
        policy, base = make_policy(f"images.test:{server.port}"), f"http://images.test:{server.port}"
        assert get(f"{base}/a", policy) == CONTENT
        assert reject(f"{base}/down", policy) == ("media_fetch_failed", f"{base}/down can't be fetched: HTTP 503")
        assert reject(f"{base}/gone", policy) == ("media_fetch_failed", f"{base}/gone can't be fetched: HTTP 404")
        assert server.paths == ["/a"] * 3 + ["/down"] * 3 + ["/gone"]


def test_a_name_that_is_not_found_and_a_closed_port_are_one_rows_error() -> None:
    assert reject("http://nowhere.test/a", make_policy("nowhere.test"))[1] == (
        "http://nowhere.test/a can't be fetched: the host nowhere.test is not found: Name or service not known"
    )
    with serve() as server:
        port = server.port
    type, message = reject(f"http://images.test:{port}/a", make_policy(f"images.test:{port}"))
    assert type == "media_fetch_failed"
    assert "refused" in message


def make_certificate(name: str, path: Path) -> None:
    """Write a certificate for a name, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def test_a_certificate_must_be_trusted_and_for_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificate("images.test", tmp_path / "images.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "images.pem")
    with serve(a=send()) as server:
        server.use_tls(context)
        policy = make_policy(f"images.test:{server.port}", f"other.test:{server.port}")
        url = f"https://images.test:{server.port}/a"
        assert "self-signed certificate" in reject(url, policy)[1]
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "images.pem"))
        assert get(url, policy) == CONTENT
        assert "Hostname mismatch" in reject(f"https://other.test:{server.port}/a", policy)[1]


def test_a_server_that_speaks_no_tls_or_no_http_is_one_rows_error() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        def talk() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"hello\r\n\r\n")

        threading.Thread(target=talk, daemon=True).start()
        for scheme in ("http", "https"):
            type, message = reject(f"{scheme}://images.test:{port}/a", make_policy(f"images.test:{port}"))
            assert type == "media_fetch_failed"
            assert "\n" not in message
        listener.shutdown(socket.SHUT_RDWR)
