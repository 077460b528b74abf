"""Explain why a model or tokenizer can't be had: errors of the Hugging Face Hub, caches, and files that aren't whole.

- transformers and vLLM wrap the Hub's errors, and keep them as the causes of their own.
- A file under Git LFS is a pointer of three lines until `git lfs pull` has fetched it.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dpgen.errors import ConfigError

HUB_CACHE_VARIABLES = "HF_HUB_CACHE, else HF_HOME"

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024
_WRITE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
_PROBE_BYTES = 4096
_MAX_LISTED = 3
_DATASET_UNREACHED = "Couldn't reach "  # of `datasets`, which keeps only the name of the Hub's error
_ADAPTER_FILES = ["adapter_config.json", "adapter_model.*"]
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")  # the last for datasets alone
_LOG_IN = "log in (`hf auth login`, or set HF_TOKEN) on every node"


def explain_hub_error(name: str, error: BaseException, kind: Literal["model", "dataset"] = "model") -> str | None:
    """Return in one line why a repository can't be read and what to do about it; None if the Hub is not the reason.

    Args:
        name: the repository.
        error: the error, whose causes are searched, too.
        kind: of the repository.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    is_unreached, answer = False, None  # unless a cause below says why
    for cause in iter_causes(error):
        is_unreached |= isinstance(cause, LocalEntryNotFoundError) or str(cause).startswith(_DATASET_UNREACHED)
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, GatedRepoError):
            place = f"{'datasets/' if kind == 'dataset' else ''}{getattr(cause, 'repo_id', None) or name}"
            return (
                f"{name} is a gated repository and the Hub refuses access to it (status {status}): accept its terms "
                f"at {constants.ENDPOINT}/{place} and {_LOG_IN}"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return f"there is no repository {name} on the Hub, or it is private: check the name, or {_LOG_IN}"
        if isinstance(cause, RevisionNotFoundError):
            return None  # its own message names the revision
        if isinstance(cause, HfHubHTTPError) and status in (401, 403):
            return f"the Hub refuses access to {name} (status {status}): check HF_TOKEN, or {_LOG_IN}"
        if isinstance(cause, HfHubHTTPError):
            answer = status
        if isinstance(cause, OSError) and cause.errno in _WRITE_ERRORS and _is_near(constants.HF_HUB_CACHE, cause):
            return (
                f"the Hub's cache can't be written: {cause.filename}: {cause.strerror}. Set HF_HOME to a folder that "
                f"can (now: {constants.HF_HUB_CACHE}, of {HUB_CACHE_VARIABLES})"
            )
    if not is_unreached:
        return None
    if answer is not None:
        remedy = "start again later" if answer == 429 or answer >= 500 else f"check HF_ENDPOINT ({constants.ENDPOINT})"
        return f"the Hub answered with status {answer} for {name}: {remedy}"
    switches = _OFFLINE_VARIABLES[: None if kind == "dataset" else -1]
    is_on = [switch for switch in switches if os.environ.get(switch, "").upper() in constants.ENV_VARS_TRUE_VALUES]
    why = f"{is_on[0]} is set" if is_on else f"{constants.ENDPOINT} can't be reached from this node"
    if kind == "dataset":  # `datasets` reads nothing of the Hub's cache without the Hub
        return (
            f"{name} is no folder here, and {why}: check the name, or download it where there is a network, with "
            f"`hf download {name} --repo-type dataset --local-dir DIR`, and set data.path=DIR"
        )
    return (
        f"{name} is no folder here and not in the Hub's cache ({constants.HF_HUB_CACHE}), and {why}: check the name, "
        "or download it where there is a network (`hf download`)"
    )


def fetch_adapter(place: str, *, is_cached: bool) -> Path:
    """Return the folder of a LoRA adapter: the place itself, or the commit of a Hub repository in the Hub's cache.

    Args:
        place: a folder, or a name on the Hub.
        is_cached: take what an earlier call has fetched, without asking the Hub.

    Raises:
        ConfigError: there is no such folder, and the Hub gives none; the caller names the adapter.
    """
    folder = Path(place).expanduser()
    if folder.exists():
        return folder
    if place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise ConfigError("there is no such directory")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(place, allow_patterns=_ADAPTER_FILES, local_files_only=is_cached))
    except Exception as error:  # noqa: BLE001 - the client passes on errors of its HTTP library, which it has changed
        reason = explain_hub_error(place, error) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"there is no such directory, and the Hub gives no such repository: {reason}") from None


def check_cache(folder: str | Path, what: str, variables: str) -> None:
    """Check that files can be made in a cache's folder, which is created.

    Args:
        what: the cache, for the message.
        variables: the environment variables or keys that place it.

    Raises:
        ConfigError: they can't; names the folder and the variables.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise ConfigError(
            f"{what}, {folder}, can't be written: {error.strerror}. Set {variables} to a folder that can"
        ) from None


def is_lfs_pointer(path: Path) -> bool:
    """Return True if the file is a Git LFS pointer, and not what it points to."""
    try:
        if path.stat().st_size > _MAX_POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def find_broken_file(folder: Path, pattern: str = "*.json") -> str | None:
    """Return which small text file of a model's folder is an LFS pointer or cut short, and what to do; None if none is.

    JSON files are parsed, so call it where one of them could not be loaded, or for small ones.
    """
    for path in sorted(folder.glob(pattern)):
        if is_lfs_pointer(path):
            return describe_lfs_pointers(folder, [path.name])
        if path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                return f"{path} is damaged: {error}. If a download was cut short, download it again"
    return None


def describe_lfs_pointers(folder: Path, names: list[str]) -> str:
    """Return the message about files of a folder that are Git LFS pointers."""
    shown = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
    what = "is a Git LFS pointer, not the file itself" if len(names) == 1 else "are Git LFS pointers, not the files"
    return f"{shown} in {folder} {what}: run `git lfs pull` there (after `git lfs install`)"


def _is_near(folder: str, error: OSError) -> bool:
    """Return True if the error is about a file below a folder, or about a folder above it."""
    path, name = os.path.abspath(folder), os.path.abspath(str(error.filename or ""))
    return bool(error.filename) and os.path.commonpath([path, name]) in (path, name)


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then what caused it, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
