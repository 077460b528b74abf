"""`data.path` takes addresses: what they stand for is fetched once for each version, and read as local files are."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import sys
import threading
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import _registry as registered
from helpers.stores import SECRET_KEY, S3Server, serve_s3, to_lines

from dpgen.config.loader import load
from dpgen.config.schema import Config, to_yaml
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.openai_batch.recognition import resolve_format
from dpgen.data.storage import fetching
from dpgen.data.storage.listing import list_addresses
from dpgen.errors import EXIT_RESUMABLE, ConfigError, TransferStopped

Load = Callable[..., InputRows]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serve_s3("bucket") as server:
        store = server.file_system
        for number in range(3):
            store.pipe(f"bucket/rows/part-{number}.jsonl", to_lines([f"{number} {row}" for row in range(3)]))
        store.pipe("bucket/packed/rows.jsonl.gz", gzip.compress(to_lines(["packed"])))
        store.pipe("bucket/packed/.hidden.jsonl", to_lines(["hidden"]))
        store.pipe("bucket/bad.jsonl", b'{"prompt": "x"}\n{x\n')
        store.pipe("bucket/notes/readme.xyz", b"x")
        yield server


@pytest.fixture
def load_from(server: S3Server, tmp_path: Path) -> Load:
    def load_rows(path: Any, cache: str = "cache", **options: Any) -> InputRows:
        options = {**server.options, **options} if "s3://" in str(path) else options
        cache_dir = str(tmp_path / cache)
        return load_input(DataConfig(path=path, prompt_column="prompt", storage_options=options, cache_dir=cache_dir))

    return load_rows


def read_prompts(rows: InputRows) -> list[str]:
    return list(rows.dataset["prompt"])


ALL = [f"{part} {row}" for part in range(3) for row in range(3)]


@pytest.mark.parametrize(
    ("path", "prompts"),
    [
        ("s3://bucket/rows/part-1.jsonl", ALL[3:6]),
        ("s3://bucket/rows/*.jsonl", ALL),
        ("s3://bucket/rows/part-[02].jsonl", ALL[:3] + ALL[6:]),
        ("s3://bucket/rows", ALL),
        ("s3://bucket/rows/", ALL),
        ("s3://bucket/packed", ["packed"]),
        (["s3://bucket/rows/part-2.jsonl", "s3://bucket/packed/rows.jsonl.gz"], [*ALL[6:], "packed"]),
    ],
)
def test_objects_patterns_folders_and_lists_are_read_in_order(load_from: Load, path: Any, prompts: list[str]) -> None:
    assert read_prompts(load_from(path)) == prompts


def test_local_files_and_addresses_may_be_mixed(load_from: Load, tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").write_bytes(to_lines(["here"]))
    paths = [f"file://{tmp_path / 'here.jsonl'}", "s3://bucket/rows/part-0.jsonl", str(tmp_path / "here.jsonl")]
    assert read_prompts(load_from(paths)) == ["here", *ALL[:3], "here"]


def test_a_changed_object_is_fetched_again_and_an_unchanged_one_is_not(load_from: Load, server: S3Server) -> None:
    name = f"bucket/changing-{uuid.uuid4().hex}.jsonl"
    server.file_system.pipe(name, to_lines(["before"]))
    for _ in range(2):
        assert read_prompts(load_from(f"s3://{name}")) == ["before"]
    assert server.count("GET", name) == 1
    server.file_system.pipe(name, to_lines(["later!"]))  # of the same size
    assert read_prompts(load_from(f"s3://{name}")) == ["later!"]


def test_the_input_is_the_same_whatever_the_cache_and_the_store(
    load_from: Load, server: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    for number in range(3):
        (tmp_path / f"rows/{number}.jsonl").write_bytes(server.file_system.cat(f"bucket/rows/part-{number}.jsonl"))
    places = [load_from("s3://bucket/rows", cache="a"), load_from("s3://bucket/rows/*.jsonl", cache="b")]
    places.append(load_from(str(tmp_path / "rows")))
    fingerprints = [rows.fingerprint() for rows in places]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]


def test_an_interrupted_download_continues_where_it_stopped(
    load_from: Load, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, prompts = f"bucket/long-{uuid.uuid4().hex}.jsonl", [str(row) for row in range(200)]
    server.file_system.pipe(name, to_lines(prompts))
    monkeypatch.setattr(fetching, "_PIECE_BYTES", 256)
    monkeypatch.setattr(fetching, "_MAX_TRIES", 1)
    count = fetching.Fetcher._count

    def count_and_break(self: fetching.Fetcher, num_bytes: int) -> None:
        count(self, num_bytes)
        if self._num_bytes >= 1024:
            raise ConnectionResetError("the network is gone")

    with monkeypatch.context() as broken:
        broken.setattr(fetching.Fetcher, "_count", count_and_break)
        with pytest.raises(
            TransferStopped, match=r"broke off: .*the network is gone.* The same command continues"
        ) as stop:
            load_from(f"s3://{name}")
    assert stop.value.exit_status == EXIT_RESUMABLE
    del server.requests[:]
    assert read_prompts(load_from(f"s3://{name}")) == prompts
    ranges = [range for method, path, range in server.requests if method == "GET" and name in path]
    assert "bytes=0-255" not in ranges and "bytes=1024-1279" in ranges


def test_a_fetch_that_is_stopped_while_it_waits_for_another_process_writes_nothing(
    load_from: Load, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"bucket/shared-{uuid.uuid4().hex}.jsonl"
    server.file_system.pipe(name, to_lines(["a", "b"]))
    started = threading.Event()

    def hold(file: Any, operation: int) -> None:
        started.set()
        raise BlockingIOError

    def stop() -> None:
        if started.is_set():
            raise KeyboardInterrupt

    with monkeypatch.context() as held:
        held.setattr(fetching.fcntl, "flock", hold)
        address = f"s3://{name}"
        listing = list_addresses([address], server.options)
        with pytest.raises(KeyboardInterrupt):
            fetching.Fetcher(tmp_path / "cache", server.options, stop).fetch(listing)
    assert not list(tmp_path.rglob("*.part")), "the other process writes this file"
    assert read_prompts(load_from(address)) == ["a", "b"]


def test_a_damaged_file_of_the_cache_is_fetched_again_for_folders_too(
    load_from: Load, server: S3Server, tmp_path: Path
) -> None:
    folder = f"bucket/folder-{uuid.uuid4().hex}"
    server.file_system.pipe(f"{folder}/rows.jsonl", to_lines(["a", "b"]))
    assert read_prompts(load_from(f"s3://{folder}/")) == ["a", "b"]
    [place] = (tmp_path / "cache" / "objects").rglob("rows.jsonl")
    place.write_bytes(to_lines(["a", "b", "c"]))
    assert read_prompts(load_from(f"s3://{folder}/")) == ["a", "b"]


def test_an_object_that_changes_while_it_is_fetched_is_an_error(
    load_from: Load, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"bucket/growing-{uuid.uuid4().hex}.jsonl"
    server.file_system.pipe(name, to_lines(["a"]))
    read = fetching.Fetcher._read

    def read_and_change(self: Any, *args: Any) -> None:
        read(self, *args)
        server.file_system.pipe(name, to_lines(["b"]))

    monkeypatch.setattr(fetching.Fetcher, "_read", read_and_change)
    with pytest.raises(ConfigError, match=f"s3://{name} changed while it was fetched"):
        load_from(f"s3://{name}")


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        (
            "s3://bucket/rows/part-9.jsonl",
            {},
            r"no such object or folder; did you mean part-\d.jsonl\? beside it: part-0",
        ),
        ("s3://elsewhere/rows.jsonl", {}, "data.path=s3://elsewhere/rows.jsonl: there is no such bucket"),
        ("s3://bucket/*.csv", {}, r"data.path=s3://bucket/\*.csv: no object matches"),
        ("s3://bucket/notes", {}, "holds no data file; it holds readme.xyz"),
        (
            "s3://bucket/bad.jsonl",
            {},
            r"^data.path=s3://bucket/bad.jsonl: s3://bucket/bad.jsonl, line 2 is not valid JSON",
        ),
        ("s3://bucket/rows", {"nonsense": 1}, "data.storage_options: .*nonsense"),
        (
            "s3://bucket/rows",
            {"endpoint_url": "http://127.0.0.1:9"},
            "the store can't be reached .*data.storage_options",
        ),
        ("s33://bucket/rows", {}, "there is no store s33://; did you mean 's3'"),
        ("http://127.0.0.1:9/rows.jsonl", {}, "the store can't be reached"),
        ("http://127.0.0.1:9/rows/", {}, "folders of a web server can't be listed; name the files"),
        ("zip://rows.jsonl::s3://bucket/a.zip", {}, "chained addresses are not read"),
    ],
)
def test_what_is_wrong_with_an_address_is_said_in_one_line(
    load_from: Load, path: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        load_from(path, **options)
    assert "\n" not in str(raised.value)


def test_missing_credentials_name_the_variables(
    load_from: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"no credentials for it: set AWS_ACCESS_KEY_ID .* on every node, or data.storage"
    ):
        load_from("s3://bucket/rows", key=None, secret=None)


@pytest.mark.parametrize(
    ("status", "words"), [(403, "refuses access .status 403"), (301, "in another region: set AWS_DEFAULT_REGION")]
)
def test_a_store_that_refuses_is_explained(load_from: Load, server: S3Server, status: int, words: str) -> None:
    server.refuse = lambda method, path: status if "secret-corner" in path else None
    try:
        with pytest.raises(ConfigError, match=f"data.path=s3://bucket/secret-corner.jsonl: .*{words}"):
            load_from("s3://bucket/secret-corner.jsonl")
    finally:
        server.refuse = lambda method, path: None


@pytest.mark.parametrize(
    ("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("az", "adlfs", "azure")]
)
def test_a_missing_package_names_the_extra(
    load_from: Load, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registered, scheme, raising=False)
    with pytest.raises(ConfigError, match=rf"{scheme}:// is not installed: pip install '\.\[{extra}\]' in dpgen's"):
        load_from(f"{scheme}://bucket/rows.jsonl")


def test_a_disk_that_is_too_small_is_noticed_before_the_download(
    load_from: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(
        ConfigError, match=r"needs \d+ bytes on the disk of .*, where 10 bytes are free.*data.cache_dir"
    ):
        load_from("s3://bucket/rows", cache="fresh")


def test_memory_is_a_store(load_from: Load) -> None:
    fsspec.filesystem("memory").pipe("/rows/a.jsonl", to_lines(["in memory"]))
    assert read_prompts(load_from("memory://rows/a.jsonl")) == ["in memory"]
    assert read_prompts(load_from("memory://rows/*.jsonl")) == ["in memory"]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serve tmp_path/web without ranges, as Python's server does; it ignores queries."""
    (tmp_path / "web").mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "web"))

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_signed_address_is_read_and_its_signature_never_shown(load_from: Load, web: str, tmp_path: Path) -> None:
    (tmp_path / "web/rows.jsonl").write_bytes(to_lines(["from the web"]))
    query = "X-Amz-Credential=aaaabbbb%2F2026&X-Amz-Signature=0123456789abcdef"
    assert read_prompts(load_from(f"{web}/rows.jsonl?{query}")) == ["from the web"]
    with pytest.raises(ConfigError, match=r"none.jsonl\?\.\.\.: there is no such object") as raised:
        load_from(f"{web}/none.jsonl?{query}".replace("//", "//me:verysecret@"))
    assert not any(secret in str(raised.value) for secret in ("0123456789abcdef", "aaaabbbb", "verysecret"))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any("Signature" in str(path) for path in files)


def test_batch_files_are_recognised_behind_an_address(server: S3Server, tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    server.file_system.pipe("bucket/batch.jsonl", line.encode() + b"\n")
    data = DataConfig(path="s3://bucket/batch.jsonl", storage_options=server.options, cache_dir=str(tmp_path))
    config = resolve_format(Config(run=RunConfig(dir="run"), data=data, model="m"))
    assert config.data.format == "openai_batch"
    assert len(load_input(config.data)) == 1


def test_options_of_a_store_are_not_written_in_clear(server: S3Server) -> None:
    options = {
        **server.options,
        "username": "me",
        "client_kwargs": {"aws_session_token": "session", "region_name": "eu", "cookies": {"id": "crumbs"}},
        "s3_additional_kwargs": {"SSECustomerKey": "customer"},
    }
    data = DataConfig(path="https://me:pw@host/rows.jsonl?sig=abcdef", prompt_column="prompt", storage_options=options)
    text = to_yaml(Config(run=RunConfig(dir="run"), data=data, model="m"))
    assert server.url in text and "region_name: eu" in text
    assert not any(
        secret in text
        for secret in (SECRET_KEY, options["key"], "username: me", "session\n", "pw", "abcdef", "crumbs", "customer")
    )
    restored = dataclasses.replace(data, storage_options={"key": "<removed>", "secret": "<removed>"})
    assert restored.storage_options  # dropped where the store is opened, so that the environment's credentials count


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.dir=s3://bucket/run", "run.dir=s3://bucket/run: the run directory must be on a file system.*output.to"),
        ("model=s3://bucket/model", "must be a directory or a Hub name; copy the model"),
        ("data.cache_dir=s3://bucket/cache", "must be a directory on a disk of each node"),
        ("output.to=https://host/folder", "output.to=https://host/folder: a result is several files"),
    ],
)
def test_where_an_address_cannot_work_is_refused(override: str, words: str) -> None:
    keys = ["run.dir=run", "model=m", "data.path=rows.jsonl", "data.prompt_column=prompt", override]
    with pytest.raises(ConfigError, match=words):
        load([], keys)


def test_the_cache_is_beside_that_of_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    fsspec.filesystem("memory").pipe("/cached/a.jsonl", to_lines(["x"]))
    load_input(DataConfig(path="memory://cached/a.jsonl", prompt_column="prompt"))
    assert [name for _, _, names in os.walk(tmp_path / "hf/dpgen/objects") for name in names if name == "a.jsonl"]
