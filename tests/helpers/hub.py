"""Stand in for the Hugging Face Hub: the part of its HTTP interface that pushing a dataset calls.

Repositories and uploaded files are held in memory. `huggingface_hub` is pointed here by HF_ENDPOINT, and takes Git LFS
where HF_HUB_DISABLE_XET is set.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "standin" * 5


class HubStandIn:
    """Serve one user's datasets on a free port of this machine; a context manager.

    Attributes:
        files: content of each dataset's files, by the dataset's name and the file's.
        private: datasets that are private.
        objects: uploaded LFS objects, by hash.
        uploads: hashes in the order of their uploads, with repetitions.
        commits: messages.
        max_uploads: further uploads get no answer; None for no limit.
        is_blocking: set once an upload gets no answer.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.commits: list[str] = []
        self.max_uploads: int | None = None
        self.is_blocking, self._may_go_on, self._lock = threading.Event(), threading.Event(), threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._may_go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def take_upload(self, oid: str, content: bytes) -> None:
        """Keep an uploaded object, or never answer."""
        with self._lock:
            is_taken = self.max_uploads is None or len(self.uploads) < self.max_uploads
            if is_taken:
                assert hashlib.sha256(content).hexdigest() == oid
                self.objects[oid] = content
                self.uploads.append(oid)
        if not is_taken:
            self.is_blocking.set()
            self._may_go_on.wait()

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/datasets/(\w+/\w+)(?:/revision/main)?", path):
            name = match[1]
            if name not in self.hub.files:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": file} for file in self.hub.files[name]]
            info = {"id": name, "private": name in self.hub.private, "sha": "0" * 40, "siblings": siblings}
            return self._answer(200, info)
        if match := re.fullmatch(r"/api/datasets/(\w+/\w+)/tree/main", path):
            files = self.hub.files[match[1]].items()
            return self._answer(
                200, [{"type": "file", "path": file, "size": len(content), "oid": "0"} for file, content in files]
            )
        if match := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/main/(.+)", path):
            content = self.hub.files[match[1]][match[2]]
            headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            return self._answer(200, content, headers)
        return self._answer(404, {"error": f"not in the stand-in: GET {path}"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/datasets/(\w+/\w+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if re.fullmatch(r"/datasets/(\w+/\w+)\.git/info/lfs/objects/batch", path):
            return self._answer(
                200, {"transfer": "basic", "objects": list(map(self._plan, json.loads(body)["objects"]))}
            )
        if match := re.fullmatch(r"/api/datasets/(\w+/\w+)/commit/main", path):
            self.hub.commit(match[1], [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.endpoint}/datasets/{match[1]}/commit/{'1' * 40}"
            return self._answer(200, {"commitUrl": url, "commitOid": "1" * 40})
        return self._answer(404, {"error": f"not in the stand-in: POST {path}"})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.take_upload(self.path.rpartition("/")[2], content)
        self._answer(200, {})

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        url = {"url": f"{self.hub.endpoint}/datasets/{name}"}
        if name in self.hub.files:
            return self._answer(409, {"error": "You already created this dataset repo", **url})
        self.hub.files[name] = {".gitattributes": b"*.parquet filter=lfs\n"}
        if request.get("private") or request.get("visibility") == "private":
            self.hub.private.add(name)
        return self._answer(200, url)

    def _plan(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.hub.objects:
            return item
        return {**item, "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{item['oid']}"}}}

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
