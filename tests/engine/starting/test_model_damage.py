"""Checking a model's files and caches before a model loads; tests/data/test_hub.py explains the Hub's errors."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpgen.engine.starting.model_damage import check_model_files, has_weights, measure_weights
from dpgen.errors import ConfigError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 5312\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_safetensors(num_bytes: int = 64, dtype: str = "U8") -> bytes:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": dtype, "data_offsets": [0, num_bytes]}})
    return len(header).to_bytes(8, "little") + header.encode() + bytes(num_bytes)


def save_sharded(folder: Path) -> None:
    for name in SHARDS:
        (folder / name).write_bytes(make_safetensors())
    index = {"weight_map": dict(zip("ab", SHARDS, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(make_safetensors())
    return folder


def use_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_sharded(folder)


def use_bin(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def save_zip(folder: Path) -> bytes:
    path = folder / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", bytes(100))
    content = path.read_bytes()
    path.unlink()
    return content


def drop_second_shard(folder: Path) -> None:
    use_shards(folder)
    (folder / SHARDS[1]).unlink()


def drop_second_shard_and_index(folder: Path) -> None:
    drop_second_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def link_to_nothing(folder: Path) -> None:
    use_shards(folder)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[0]).symlink_to(folder / "blobs" / "incomplete")


def truncate(name: str, num_bytes: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, num_bytes)


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "weights that are an LFS pointer",
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        r"model.safetensors in .*/model is a Git LFS pointer, not the file itself: run `git lfs pull` there",
    ),
    (
        "a tokenizer that is one",
        lambda folder: (folder / "tokenizer.json").write_text(POINTER),
        r"tokenizer.json in .* is a Git LFS pointer",
    ),
    (
        "all files that are pointers",
        lambda folder: [path.write_text(POINTER) for path in folder.iterdir()],
        r"config.json, tokenizer.json in .* are Git LFS pointers, not the files: run `git lfs pull`",
    ),
    (
        "bin weights that are a pointer",
        lambda folder: use_bin(folder, POINTER.encode()),
        "pytorch_model.bin in .* is a Git LFS pointer",
    ),
    (
        "a shard that the index names and that is missing",
        drop_second_shard,
        rf"model.safetensors.index.json names 1 that .* does not hold \({SHARDS[1]}\)",
    ),
    (
        "a shard that is missing, and the index, too",
        drop_second_shard_and_index,
        rf"the shards' names tell of 1 that .* does not hold \({SHARDS[1]}\)",
    ),
    ("a shard that is a link to nothing", link_to_nothing, rf"names 1 .*\({SHARDS[0]}\)"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights \(\*.safetensors"),
    ("half of the weights", truncate("model.safetensors", 110), r"is cut short: it has 110 of 1\d\d bytes"),
    ("half of the header", truncate("model.safetensors", 30), "is cut short: it has 30 bytes, and its header alone"),
    ("five bytes", truncate("model.safetensors", 5), "is no safetensors file"),
    ("no bytes", truncate("model.safetensors", 0), "is empty"),
    (
        "a page of HTML",
        lambda folder: (folder / "model.safetensors").write_text("<!DOCTYPE html><html>..."),
        "is no safetensors file",
    ),
    ("half a zip file", lambda folder: use_bin(folder, save_zip(folder)[:60]), "is cut short: it has a zip file's"),
    ("half a config.json", lambda folder: (folder / "config.json").write_text('{"a": '), "config.json is damaged"),
    (
        "half of the sampling's defaults, which vLLM would do without",
        lambda folder: (folder / "generation_config.json").write_text('{"temperature": 0.'),
        "generation_config.json is damaged",
    ),
    ("no adapter", lambda folder: (folder / "adapter_config.json").touch(), "adapter_config.json is damaged"),
    (
        "an empty chat template",
        lambda folder: (folder / "chat_template.jinja").touch(),
        "a chat template in .*/model is empty",
    ),
    (
        "half an index",
        lambda folder: (use_shards(folder), os.truncate(folder / "model.safetensors.index.json", 20)),
        "index.json is damaged",
    ),
]


@pytest.mark.parametrize(("break_model", "words"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_model_that_is_not_whole_is_rejected_with_its_file(
    folder: Path, break_model: Callable[[Path], Any], words: str
) -> None:
    check_model_files(str(folder), {})
    break_model(folder)
    with pytest.raises(ConfigError, match=f"model={folder}: .*{words}"):
        check_model_files(str(folder), {})


def test_files_that_vllm_does_not_load_may_be_anything(folder: Path) -> None:
    for name in ("pytorch_model.bin", "picture.png", "tf_model.h5"):
        (folder / name).write_text(POINTER)
    use_shards(folder)
    (folder / "extra.safetensors").write_text(POINTER)  # not in the index
    check_model_files(str(folder), {})
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin .*LFS"):  # the format that does load it
        check_model_files(str(folder), {"load_format": "npcache"})
    (folder / SHARDS[0]).unlink()
    with pytest.raises(ConfigError, match=f"weights are missing.*{SHARDS[0]}"):
        check_model_files(str(folder), {})
    for load_format in ("dummy", "sharded_state", "a plugin's"):
        check_model_files(str(folder), {"load_format": load_format})


def test_bin_weights_are_whole_if_their_zip_file_or_old_pickle_is(folder: Path) -> None:
    use_bin(folder, save_zip(folder))
    check_model_files(str(folder), {})
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02 an old pickle")
    check_model_files(str(folder), {})
    for content, words in ((save_zip(folder)[:-30], "is cut short"), (b"", "is empty")):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ConfigError, match=f"pytorch_model.bin {words}"):
            check_model_files(str(folder), {})


def test_a_tokenizer_of_its_own_is_checked_too(folder: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_text(POINTER)
    with pytest.raises(ConfigError, match=f"engine.tokenizer={tokenizer}: tokenizer.model in .* Git LFS pointer"):
        check_model_files(str(folder), {"tokenizer": str(tokenizer)})


def test_a_cache_that_weights_can_not_be_written_to_is_named_with_its_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert not has_weights("nobody/nothing", {}) and not has_weights("not:a:name", {})
    with pytest.raises(ConfigError, match=r"file/hub, can't be written: Not a directory. Set HF_HUB_CACHE or HF_HOME"):
        check_model_files("nobody/nothing", {})
    with pytest.raises(ConfigError, match=r"file/x, can't be written: .*engine.download_dir"):
        check_model_files("nobody/nothing", {"download_dir": str(tmp_path / "file" / "x")})
    check_model_files("nobody/nothing", {"download_dir": str(tmp_path / "weights")})


def save_in_hub_cache(cache: Path, ref: str, *names: str) -> None:
    """Save files of the model `org/name`, whose revision `ref` has been downloaded into this cache."""
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / ref).write_text("a" * 40)
    (repo / "snapshots" / ("a" * 40)).mkdir(parents=True)
    for name in names:
        (repo / "snapshots" / ("a" * 40) / name).write_bytes(make_safetensors())


def test_a_cache_that_holds_the_weights_to_load_need_not_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the revision and in the folder that vLLM takes; in Mistral's format, too."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    save_in_hub_cache(hub, "v1.0", "consolidated.safetensors")
    monkeypatch.setattr(
        "dpgen.engine.starting.model_damage.check_cache", lambda *_: pytest.fail("nothing is to be written")
    )
    pinned = {"revision": "v1.0"}
    check_model_files("org/name", pinned)
    assert has_weights("org/name", pinned) and has_weights("org/name", {"revision": "a" * 40})
    assert not has_weights("org/name", {}), "another revision is not here"
    assert not has_weights("org/name", {**pinned, "download_dir": str(tmp_path / "other")})
    assert measure_weights("org/name", pinned) == 64

    options = {"download_dir": str(tmp_path / "weights")}
    save_in_hub_cache(tmp_path / "weights", "main", "model.safetensors")
    check_model_files("org/name", options)
    assert has_weights("org/name", options) and measure_weights("org/name", options) == 64


def test_ranks_wait_for_no_download_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert has_weights(str(tmp_path / "model.gguf"), {})
    assert has_weights("s3://bucket/model", {}) and has_weights("org/nothing", {"load_format": "dummy"})


def test_weights_are_measured_by_their_tensors_and_those_of_32_bits_count_half(folder: Path) -> None:
    assert measure_weights(str(folder), {}) == 64
    (folder / "model-old.safetensors").write_bytes(b"no part of the model")
    assert measure_weights(str(folder), {}) == 0, "damaged: not known"
    (folder / "model-old.safetensors").unlink()
    use_shards(folder)
    (folder / SHARDS[0]).write_bytes(make_safetensors(4096, "F32"))
    (folder / "model-old.safetensors").write_bytes(make_safetensors(1 << 20))  # not in the index
    assert measure_weights(str(folder), {}) == 64 + 2048


@pytest.mark.parametrize("option", [{"quantization": "fp8"}, {"load_format": "dummy"}, {"cpu_offload_gb": 4}])
def test_weights_that_take_less_than_their_files_are_not_measured(folder: Path, option: dict[str, Any]) -> None:
    assert measure_weights(str(folder), option) == 0
    assert measure_weights("org/not-cached", {}) == 0
