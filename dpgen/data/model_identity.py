"""Identify a model by its files, so that other weights or another chat template under the same name are noticed.

- Configuration, tokenizer and code are hashed whole. Weights are known by size, date, header and samples of their
  bytes: hashing all of them would take longer than loading them.
- A model of the Hub is known by its commit.
- `dpgen.engine.starting.model_damage` tells whether the files are whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from dpgen.config.prompt import PromptConfig
from dpgen.data.hub import fetch_adapter
from dpgen.data.prompts.chat_template import load_chat_template
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
# Keys inside of options that name a model: of a draft, for example.
_MODEL_KEYS = {"model", "draft_model", "tokenizer", "hf_config_path", "local_path", "lora_path"}


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
    for option, value in engine.items():
        if option not in places:
            places |= {place: (path, None) for place, path in _iter_paths(option, value)}
    found = {option: _identify(*place) for option, place in places.items()}
    return {option: facts for option, facts in found.items() if facts}


def identify_adapters(lora: Mapping[str, str]) -> dict[str, Any]:
    """Return what identifies each LoRA adapter: name → file → facts, or name → the Hub's commit.

    Raises:
        ConfigError: a file can't be read.
    """
    found = {}
    for name, place in lora.items():
        folder = fetch_adapter(place, is_cached=True)
        is_own = folder == Path(place).expanduser()
        found[name] = _identify(str(folder), None) if is_own else {"commit": folder.name}
    return found


def hash_chat_template(prompt: PromptConfig) -> str | None:
    """Return a hash of the text of `data.chat_template` where the key names a file; None where it holds the text.

    Raises:
        ConfigError: it looks like a path, but can't be read.
    """
    text = load_chat_template(prompt)
    if text is None or text == prompt.chat_template:
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def read_safetensors_header(file: BinaryIO, max_bytes: int) -> tuple[int, bytes]:
    """Return the length that a safetensors file names for its header, and at most `max_bytes` of that header.

    Fewer bytes than both mean that the file ends there. A file of fewer than 8 bytes names no length: 0.
    """
    start = file.read(8)
    num_bytes = int.from_bytes(start, "little") if len(start) == 8 else 0
    return num_bytes, file.read(min(num_bytes, max_bytes))


def _iter_paths(place: str, value: Any, is_option: bool = True) -> Iterator[tuple[str, str]]:
    """Yield (place, path) for what an option names on the disk: a draft model, adapters, quantization parameters."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _iter_paths(f"{place}[{key}]", item, key in _MODEL_KEYS)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _iter_paths(f"{place}[{index}]", item, False)
    elif is_option and isinstance(value, str):
        has_form = value.startswith(("/", "~", "."))
        if has_form or ("/" in value and os.path.exists(value)):
            yield place, value


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
        digest.update(stream.read(8))
        if file.suffix == ".safetensors":
            stream.seek(0)
            digest.update(read_safetensors_header(stream, _MAX_HEADER_BYTES)[1])
        for number in range(_NUM_SAMPLES + 1):
            stream.seek(max(0, status.st_size - _SAMPLE_BYTES) * number // _NUM_SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))
    date = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="microseconds")
    return f"{status.st_size:,} bytes, {date}, hash {digest.hexdigest()}"
