"""Find damage in a model's files before it loads: missing or cut ones, and Git LFS pointers; and check its caches.

- Follows vLLM 0.32 (`model_loader/default_loader.py`, `_prepare_weights`) in which files it would load. Where another
  `engine.load_format` chooses them, only the small files are checked.
- Reads the headers of safetensors files, and no weights. `dpgen.data.model_identity` tells which model they are.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpgen.data.hub import (
    HUB_CACHE_VARIABLES,
    check_cache,
    describe_lfs_pointers,
    find_broken_file,
    is_lfs_pointer,
)
from dpgen.data.model_identity import read_safetensors_header
from dpgen.data.tokenizer import looks_like_path
from dpgen.errors import ConfigError

_SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
_PATTERNS = {
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "mistral": ("consolidated*.safetensors",),
    "pt": ("*.pt",),
    "npcache": ("*.bin",),
}
# Read by vLLM and transformers, some of which take a broken one for a missing one, and go on with other values.
_READ_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "processor_config.json", "adapter_config.json"),
)
_WEIGHT_FILES = tuple(
    f"{name}{index}"
    for name in ("model.safetensors", "consolidated.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
)
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")
_MAX_HEADER_BYTES = 100 << 20  # of safetensors: the format's own limit
_MAX_LISTED = 3
# Options that make the weights on the device smaller than their files.
_SMALLER_WEIGHTS = {
    *("quantization", "hf_overrides", "hf_config_path", "model_weights", "model_loader_extra_config"),
    *("cpu_offload_gb", "offload_group_size", "offload_backend", "language_model_only"),
}


def check_model_files(model: str, options: Mapping[str, Any]) -> None:
    """Check the files of `model`, and of `engine.tokenizer`, where they are in folders.

    Args:
        model: a folder, a file, or a name on the Hub.
        options: other fields of vLLM's EngineArgs.

    Raises:
        ConfigError: files are missing, cut short, or LFS pointers; or the cache that they go to can't be written.
    """
    folder, key = Path(model), f"model={model}"
    if looks_like_path(model) and not folder.exists():
        raise ConfigError(f"{key}: there is no such directory")
    if folder.is_dir():
        _check_small_files(key, folder)
        _check_weights(key, folder, str(options.get("load_format") or "auto"))
    elif folder.is_file():
        if is_lfs_pointer(folder):
            raise ConfigError(f"{key}: {describe_lfs_pointers(folder.parent, [folder.name])}")
    elif _find_weights(model, options) is None and "://" not in model:
        _check_hub_cache(options)
    tokenizer = options.get("tokenizer")
    if isinstance(tokenizer, str) and Path(tokenizer).is_dir():
        _check_small_files(f"engine.tokenizer={tokenizer}", Path(tokenizer))


def has_weights(model: str, options: Mapping[str, Any]) -> bool:
    """Return True if loading downloads no weights that ranks share: they are here, a URL streams them, or none load.

    Args:
        options: other fields of vLLM's EngineArgs.
    """
    needs_none = str(options.get("load_format")).lower() == "dummy" or "://" in model
    return needs_none or os.path.exists(os.path.expanduser(model)) or _find_weights(model, options) is not None


def measure_weights(model: str, options: Mapping[str, Any]) -> int:
    """Return the least bytes that vLLM needs for the weights of safetensors files; 0 if that is not known.

    A weight of 32 bits counts as one of 16, which `dtype: auto` makes of it.

    Args:
        options: other fields of vLLM's EngineArgs.
    """
    if str(options.get("load_format") or "auto") not in _PATTERNS | {"auto": ()} or _SMALLER_WEIGHTS & options.keys():
        return 0
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        cached = _find_weights(model, options) or find_small_file(model, "config.json", options)
        if cached is None:
            return 0
        folder = Path(cached).parent
    stem = "consolidated" if any(folder.glob("consolidated*.safetensors")) else "model"
    try:
        names = _read_index(model, folder / f"{stem}.safetensors.index.json")
        paths = folder.glob(f"{stem}*.safetensors") if names is None else [folder / name for name in names]
        return sum(_measure_file(path) for path in paths)
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return 0


def find_small_file(model: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """Return a file of the model's folder, or of its repository in a cache; None if it is not there.

    Args:
        options: other fields of vLLM's EngineArgs.
    """
    path = Path(os.path.expanduser(model)) / name
    if not path.parent.is_dir():
        revision, download_dir = options.get("revision"), options.get("download_dir")
        # Of the files that are no weights, vLLM has some in the Hub's cache whatever `download_dir` is.
        cached = _find_cached(model, name, revision, download_dir) or _find_cached(model, name, revision)
        return None if cached is None else Path(cached)
    return path if path.is_file() else None


def _measure_file(path: Path) -> int:
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(read_safetensors_header(file, _MAX_HEADER_BYTES)[1])
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    sizes = [(entry["data_offsets"][1] - entry["data_offsets"][0], entry["dtype"]) for entry in tensors]
    return sum(num_bytes // 2 if dtype == "F32" else num_bytes for num_bytes, dtype in sizes)


def _find_weights(model: str, options: Mapping[str, Any]) -> str | None:
    """Return the file of a model's weights, or their index, in the cache that vLLM loads from; None if neither is."""
    revision, download_dir = options.get("revision"), options.get("download_dir")
    found = (_find_cached(model, name, revision, download_dir) for name in _WEIGHT_FILES)
    return next((path for path in found if path is not None), None)


def _find_cached(model: str, name: str, revision: Any = None, cache_dir: Any = None) -> str | None:
    """Return the path of a model's file in a cache, by default the Hub's; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model, name, cache_dir=cache_dir or None, revision=revision)
    except HFValidationError:  # vLLM rejects the name, with its own message
        return None
    return path if isinstance(path, str) else None


def _check_hub_cache(options: Mapping[str, Any]) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() not in ("", "0", "false"):
        return
    download_dir = options.get("download_dir")
    if download_dir:
        check_cache(str(download_dir), "the folder for downloaded weights", "engine.download_dir")
    else:
        check_cache(constants.HF_HUB_CACHE, "the Hub's cache", HUB_CACHE_VARIABLES.replace(", else", " or"))


def _check_small_files(key: str, folder: Path) -> None:
    pointers = [path.name for pattern in _SMALL_FILES for path in folder.glob(pattern) if is_lfs_pointer(path)]
    if pointers:
        raise ConfigError(f"{key}: {describe_lfs_pointers(folder, sorted(pointers))}")
    for name in _READ_FILES:
        if broken := find_broken_file(folder, name):
            raise ConfigError(f"{key}: {broken}")
    if any(path.stat().st_size == 0 for path in folder.glob("*.jinja")):
        raise ConfigError(
            f"{key}: a chat template in {folder} is empty. If a download was cut short, download it again"
        )


def _check_weights(key: str, folder: Path, load_format: str) -> None:
    if load_format == "auto":
        load_format = "mistral" if any(folder.glob("consolidated*.safetensors")) else "hf"
    for pattern in _PATTERNS.get(load_format, ()):
        paths = [path for path in sorted(folder.glob(pattern)) if path.name not in _NO_WEIGHTS]
        if paths:
            break
    else:
        if load_format in _PATTERNS:
            raise ConfigError(
                f"{key}: {folder} holds no weights ({', '.join(_PATTERNS[load_format])}). If a download was cut short, "
                "start it again"
            )
        return
    index = folder / {
        "*.safetensors": "model.safetensors.index.json",
        "consolidated*.safetensors": "consolidated.safetensors.index.json",
    }.get(pattern, "pytorch_model.bin.index.json")
    names = _read_index(key, index)
    if names is not None:
        paths = [folder / name for name in sorted(names)]
    missing = sorted({path.name for path in paths if not path.exists()} | _find_missing_shards(paths))
    if missing:
        shown = ", ".join(missing[:_MAX_LISTED]) + (", ..." if len(missing) > _MAX_LISTED else "")
        reason = f"{index.name} names" if names is not None else "the shards' names tell of"
        raise ConfigError(
            f"{key}: weights are missing, since {reason} {len(missing)} that {folder} does not hold ({shown}). If a "
            "download was cut short, start it again (`hf download` resumes)"
        )
    if pointers := [path.name for path in paths if is_lfs_pointer(path)]:
        raise ConfigError(f"{key}: {describe_lfs_pointers(folder, pointers)}")
    for path in paths:
        if (damage := find_damage(path)) is not None:
            raise ConfigError(f"{key}: {path} {damage}. If a download was cut short, start it again")


def _read_index(key: str, path: Path) -> set[str] | None:
    """Return the names of the files in an index of weights; None if there is no index."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        return {str(name) for name in weight_map.values()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {path} is damaged ({type(error).__name__}: {error}). Download it again") from None


def _find_missing_shards(paths: list[Path]) -> set[str]:
    """Return the names of shards that the names of others tell of: of ``model-00001-of-00002`` the second."""
    named = {path.name for path in paths}
    missing = set()
    for name in named:
        if match := _SHARD.fullmatch(name):
            stem, _, num_shards, suffix = match.groups()
            expected = (f"{stem}-{number:05d}-of-{num_shards}{suffix}" for number in range(1, int(num_shards) + 1))
            missing |= {other for other in expected if other not in named}
    return missing


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a file of weights, as a predicate; None if nothing is seen to be."""
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return "is empty"
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            is_cut = file.read(2) == b"PK" and not zipfile.is_zipfile(path)
            return "is cut short: it has a zip file's beginning and no end" if is_cut else None
        num_header_bytes, header_bytes = read_safetensors_header(file, _MAX_HEADER_BYTES)
        if num_bytes < 8 or num_header_bytes > _MAX_HEADER_BYTES:
            return "is no safetensors file: it does not begin with the length of a header"
    if len(header_bytes) < num_header_bytes:
        return f"is cut short: it has {num_bytes:,} bytes, and its header alone has {8 + num_header_bytes:,}"
    try:
        tensors = [entry for name, entry in json.loads(header_bytes).items() if name != "__metadata__"]
        num_needed = 8 + num_header_bytes + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "is no safetensors file: its header can't be read"
    if num_bytes < num_needed:
        return f"is cut short: it has {num_bytes:,} of {num_needed:,} bytes"
    return None
