"""Object stores on loopback: moto's S3, with requests that a test counts, holds or refuses."""

from __future__ import annotations

import json
import logging
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ACCESS_KEY, SECRET_KEY = "testaccesskeyid", "testsecretaccesskey"


class S3Server:
    """Serve S3 in threads of this process.

    Attributes:
        requests: method, path and Range header of each request so far.
        refuse: given a method and a path, returns an HTTP status to answer with instead of the store's own; or None.
        held: part of the path of objects that are not stored until `release` is set.
        is_held: set once such an object has come.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.requests: list[tuple[str, str, str]] = []
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.held = ""
        self.is_held, self.release = threading.Event(), threading.Event()

    def __call__(self, environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        self.requests.append((method, path, environment.get("HTTP_RANGE", "")))
        if method == "PUT" and self.held and self.held in path:
            self.is_held.set()
            self.release.wait(120)
        if (status := self.refuse(method, path)) is not None:
            start_response(f"{status} Refused", [("Content-Length", "0")])
            return [b""]
        answer: Iterable[bytes] = self._application(environment, start_response)
        return answer

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of fsspec for this store."""
        return {"key": ACCESS_KEY, "secret": SECRET_KEY, "endpoint_url": self.url}

    @property
    def environment(self) -> dict[str, Any]:
        """Return the variables of a process that uses this store."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def file_system(self) -> Any:
        import fsspec

        return fsspec.filesystem("s3", use_listings_cache=False, **self.options)

    def list_names(self, folder: str) -> list[str]:
        """Return the names of the objects below a folder."""
        return sorted(path.removeprefix(f"{folder}/") for path in self.file_system.find(folder))

    def count(self, method: str, part: str) -> int:
        """Return how many requests of a method had this in their path."""
        return sum(method == done and part in path for done, path, _ in self.requests)

    def close(self) -> None:
        self._server.shutdown()


@contextmanager
def serve_s3(*buckets: str) -> Iterator[S3Server]:
    """Serve S3 with these buckets within the block."""
    server = S3Server()
    try:
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/moto-api/reset", method="POST")).close()
        for bucket in buckets:
            server.file_system.mkdir(bucket)
        yield server
    finally:
        server.release.set()
        server.close()


def to_lines(prompts: Sequence[str]) -> bytes:
    """Return JSON lines with a column `prompt`."""
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode()
