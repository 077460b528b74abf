"""Identify a model by its files, so that other weights or another chat template under the same name are noticed.

- Configuration, tokenizer and code are hashed whole. Weights are known by size, date, header and samples of their
  bytes: hashing all of them would take longer than loading them.
- A model of the Hub is known by its commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpgen.config.prompt import PromptConfig
from dpgen.data.render import load_chat_template
from dpgen.data.tokenizer import fetch_config_files
from dpgen.errors import ConfigError

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_SMALL_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".yaml"}
# Not read when a model is loaded.
_IGNORED_FILES = {"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json"}
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096
_MAX_HEADER_BYTES = 16 << 20
# Engine options that name further folders, files or repositories; revision of which option they have.
_PLACES = {"tokenizer": "tokenizer_revision", "hf_config_path": "revision", "generation_config": "revision"}


def identify_model(model: str, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a model and what belongs to it: option → file → facts, or option → the Hub's commit.

    Args:
        engine: fields of vLLM's EngineArgs.

    Raises:
        ConfigError: a file can't be read.
    """
    places = {"model": (model, engine.get("revision"))}
    for option, revision in _PLACES.items():
        name = engine.get(option)
        if isinstance(name, str) and name not in (model, "auto", "vllm"):
            places[option] = (name, engine.get(revision) or engine.get("revision"))
    # Any other option that names something on the disk: a draft model, adapters, quantization parameters.
    for option, value in engine.items():
        if option not in places and isinstance(value, str) and value.startswith(("/", "~", ".")):
            places[option] = (value, None)
    found = {option: _identify(*place) for option, place in places.items()}
    return {option: facts for option, facts in found.items() if facts}


def hash_chat_template(prompt: PromptConfig) -> str | None:
    """Return a hash of the text of `data.chat_template` where the key names a file; None where it holds the text.

    Raises:
        ConfigError: it looks like a path, but can't be read.
    """
    text = load_chat_template(prompt)
    if text is None or text == prompt.chat_template:
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _identify(name: str, revision: str | None) -> dict[str, str]:
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return {path.name: _describe_file(path)}
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file() and _is_part(file))
            files += sorted(path.glob("additional_chat_templates/*.jinja"))
            return {str(file.relative_to(path)): _describe_file(file) for file in files}
    except OSError as error:
        raise ConfigError(f"{error.filename or name} can't be read: {error.strerror}") from None
    if name.startswith(("/", "~", ".")) or "://" in name:
        return {}  # it isn't there, as whoever loads it reports
    snapshot = fetch_config_files(name, revision)
    return {} if snapshot is None else {"commit": snapshot.name}


def _is_part(file: Path) -> bool:
    if file.name.startswith(".") or file.name in _IGNORED_FILES:
        return False
    return file.suffix in _WEIGHT_SUFFIXES | _SMALL_SUFFIXES


def _describe_file(file: Path) -> str:
    """Return a file's size and hash; of weights also their date, and a hash of header and samples."""
    status = file.stat()
    digest = hashlib.blake2b(digest_size=8)
    if file.suffix not in _WEIGHT_SUFFIXES:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
        return f"{status.st_size:,} bytes, hash {digest.hexdigest()}"
    with file.open("rb") as stream:
        head = stream.read(8)
        digest.update(head)
        if file.suffix == ".safetensors":
            digest.update(stream.read(min(int.from_bytes(head, "little"), _MAX_HEADER_BYTES)))
        for number in range(_NUM_SAMPLES + 1):
            stream.seek(max(0, status.st_size - _SAMPLE_BYTES) * number // _NUM_SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))
    date = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="microseconds")
    return f"{status.st_size:,} bytes, {date}, hash {digest.hexdigest()}"
