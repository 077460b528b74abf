"""Test that files and data: URLs are read, and nothing outside of the folders that may be read."""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path

import pytest

from dpgen.config.sections import DataConfig
from dpgen.data.media.loading import load_media
from dpgen.data.media.parts import MediaPart
from dpgen.data.media.policy import MediaPolicy
from dpgen.errors import RowRefused

CONTENT = b"\x89PNG and more"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a file below it, and a secret beside it."""
    (tmp_path / "data" / "pics").mkdir(parents=True)
    (tmp_path / "data" / "pics" / "a b.png").write_bytes(CONTENT)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "data-of-others").mkdir()
    (tmp_path / "data-of-others" / "x.png").write_bytes(b"secret")
    return tmp_path / "data"


def load(source: str, *roots: Path, **limits: int) -> bytes:
    return load_media(
        MediaPart("image", "images, item 2", source=source), MediaPolicy(tuple(map(str, roots)), **limits)
    )


def reject(source: str, *roots: Path, **limits: int) -> tuple[str, str]:
    with pytest.raises(RowRefused) as raised:
        load(source, *roots, **limits)
    assert raised.value.message.startswith("images, item 2: ")
    return raised.value.type, raised.value.message.removeprefix("images, item 2: ")


@pytest.mark.parametrize("form", ["pics/a b.png", " pics/a b.png", "./pics/../pics/a b.png", "pics//a b.png"])
def test_a_path_is_relative_to_the_folder(folder: Path, form: str) -> None:
    assert load(form, folder) == CONTENT


def test_an_absolute_path_and_a_file_url_are_read_if_they_are_below_the_folder(folder: Path) -> None:
    assert load(str(folder / "pics" / "a b.png"), folder) == CONTENT
    assert load(f"file://{folder}/pics/a%20b.png", folder) == CONTENT
    assert reject("file:///etc/passwd", folder)[0] == "media_not_allowed"


def test_several_folders_are_searched_in_turn(folder: Path, tmp_path: Path) -> None:
    assert load("a b.png", folder, folder / "pics") == CONTENT
    assert load("../secret.png", folder, tmp_path) == b"secret", "it is below one of them"
    assert load(str(folder / "pics" / "a b.png"), tmp_path / "none", folder) == CONTENT
    assert reject("../../secret.png", folder / "pics", folder)[0] == "media_not_allowed"
    assert reject("none.png", folder, folder / "pics")[1].startswith("no such file: none.png (below ")


@pytest.mark.parametrize(
    "source", ["../secret.png", "pics/../../secret.png", "/etc/passwd", "../data-of-others/x.png", "/", ".."]
)
def test_nothing_outside_of_the_folder_is_read(folder: Path, source: str) -> None:
    type, message = reject(source, folder)
    assert type == "media_not_allowed"
    assert (
        message
        == f"{source} is outside of {folder}, and nothing else is read: set data.media_dir to a folder that it is in"
    )


def test_a_link_is_followed_only_to_what_may_be_read(folder: Path, tmp_path: Path) -> None:
    (folder / "inside.png").symlink_to("pics/a b.png")
    (folder / "outside.png").symlink_to(tmp_path / "secret.png")
    (folder / "outer").symlink_to(tmp_path)
    (folder / "broken.png").symlink_to("nothing.png")
    (folder / "round.png").symlink_to("round.png")
    assert load("inside.png", folder) == CONTENT
    assert reject("outside.png", folder)[0] == "media_not_allowed"
    assert reject("outer/secret.png", folder)[0] == "media_not_allowed"
    assert reject("broken.png", folder)[0] == "media_missing"
    assert reject("round.png", folder)[0] in ("media_missing", "media_invalid")
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert load("pics/a b.png", linked) == CONTENT, "the folder itself may be a link"


def test_without_a_folder_a_path_is_an_error_that_says_what_to_set() -> None:
    assert reject("a.png") == ("media_not_allowed", "a.png is a path: set data.media_dir, the folder it is in")


def test_what_is_no_file_of_its_own_is_rejected_at_once(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.png"))
        assert reject("pipe.png", folder) == ("media_invalid", "pipe.png is no file")
        assert reject("pics", folder) == ("media_invalid", "pics can't be read: Is a directory")
        assert reject("socket.png", folder)[0] == "media_invalid"
    assert reject("a\0b.png", folder)[0] == "media_missing"
    assert reject("file://[x/a.png", folder) == ("media_missing", "'file://[x/a.png' is no path and no URL")
    assert reject("\ud800.png", folder) == ("media_missing", "'\\ud800.png' is no path and no URL")
    assert reject("x" * 5000, folder)[0] == "media_missing"
    assert len(reject("x" * 5000, folder)[1]) < 200 + len(str(folder))
    assert reject("s3://bucket/a.png", folder) == (
        "media_not_allowed",
        "s3:// URLs can't be read: only paths, data:, http: and https:",
    )


def test_an_empty_file_and_one_that_is_too_large_are_rejected(folder: Path) -> None:
    (folder / "empty.png").touch()
    assert reject("empty.png", folder) == ("media_invalid", "the image has 0 bytes")
    assert load("pics/a b.png", folder, max_bytes=len(CONTENT)) == CONTENT
    assert reject("pics/a b.png", folder, max_bytes=len(CONTENT) - 1) == (
        "media_too_large",
        "pics/a b.png: 13 bytes, data.max_media_bytes=12",
    )
    with (folder / "huge.png").open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: who reads it takes an hour
    assert reject("huge.png", folder)[0] == "media_too_large"


@pytest.mark.parametrize(
    "source",
    [
        f"data:image/png;base64,{base64.b64encode(CONTENT).decode()}",
        f"DATA:image/png;BASE64,{base64.b64encode(CONTENT).decode()}",
        f"data:;base64,{base64.b64encode(CONTENT).decode()}",
        f"data:text/html;charset=utf-8;base64,{base64.b64encode(CONTENT).decode()}",
        f"data:image/png;base64, {base64.encodebytes(CONTENT).decode()}\n ",
        f"data:image/png;base64,{base64.b64encode(CONTENT).decode().replace('+', '%2B').replace('=', '%3D')}",
        "data:image/png,%89PNG and%20more",
    ],
)
def test_a_data_url_is_decoded_whatever_it_says_of_itself(source: str) -> None:
    assert load(source) == CONTENT


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:image/png;base64,*not base64*", "is no base64"),
        ("data:image/png;base64,QUJ", "is no base64"),
        ("data:image/png;base64,QUé=", "is no base64"),
    ],
)
def test_a_broken_data_url_is_rejected(source: str, words: str) -> None:
    type, message = reject(source)
    assert type == "media_invalid"
    assert words in message


def test_a_data_url_that_is_too_large_is_not_decoded_and_not_shown() -> None:
    type, message = reject("data:image/png;base64," + "QUJD" * 1_000_000, max_bytes=1000)
    assert (type, message) == ("media_too_large", "3.0 MB, data.max_media_bytes=1000")


def test_contents_are_taken_as_they_are_up_to_the_limit() -> None:
    part = MediaPart("image", "images", CONTENT, "no/such/file.png")
    assert load_media(part, MediaPolicy()) == CONTENT
    with pytest.raises(RowRefused, match="max_media_bytes=12"):
        load_media(part, MediaPolicy(max_bytes=12))
    with pytest.raises(RowRefused, match="0 bytes"):
        load_media(MediaPart("image", "images", b""), MediaPolicy())


def test_paths_are_relative_to_the_data_unless_media_dir_is_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "rows.jsonl").write_text("{}")
    (folder / "pics" / "rows.jsonl").write_text("{}")
    of = MediaPolicy.from_config
    assert of(DataConfig(path=str(folder / "rows.jsonl"))).roots == (str(folder),)
    assert of(DataConfig(path=str(folder / "**/*.jsonl"))).roots == (str(folder / "pics"), str(folder))
    assert of(DataConfig(path=str(folder))).roots == (str(folder), str(folder / "pics"))
    assert of(DataConfig(path="s3://bucket/rows.jsonl")).roots == ()
    monkeypatch.chdir(tmp_path)
    assert of(DataConfig(path="data/rows.jsonl")).roots == (str(folder),)
    assert of(DataConfig(path="x.jsonl", media_dir="data")).roots == (str(folder),), "it is asked for, so that counts"
    policy = of(
        DataConfig(
            path="x", media_dir="data", fetch_urls=["A.org"], max_media_bytes=5, max_image_pixels=6, fetch_timeout_s=7.0
        )
    )
    assert policy == MediaPolicy((str(folder),), ("a.org",), 5, 6, 7.0)


def test_files_of_a_hub_dataset_are_read_from_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = MediaPolicy.from_config(DataConfig(path="user/pictures")).roots
    assert roots[0].endswith("/datasets--user--pictures")
    assert roots[1].endswith("/downloads")
