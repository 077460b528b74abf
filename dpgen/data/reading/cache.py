"""Keep the input as one Arrow file, and its fingerprint, in the cache folder of `datasets`, by what is on the disk now.

- The cache's key comes from each file's path, size, times, inode, and first and last bytes: a file that was replaced
  is read again, whatever its date says.
- A file that changes while it is read is an error, not half of an input.
- A parser that may crash runs in a process of its own; the crash is an error that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpgen.data.openai_batch.lines import FORMAT as BATCH_FORMAT
from dpgen.data.reading.conversion import ARROW_FILE, PLACE_FILE, InputDescription, convert
from dpgen.data.reading.source import UnreadableInput
from dpgen.lifecycle.new_folder import fill_new_folder

logger = logging.getLogger(__name__)

_VERSION = 3  # of what the readers make of a file
_DESCRIPTION_FILE = "description.json"
_SMALL_BYTES = 1 << 20  # text up to this size is parsed by Python alone, which can't crash
_HEAD_BYTES = 4096
_CACHE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)
_CHILD = [sys.executable, "-m", "dpgen.data.reading.conversion"]


def compute_files_key(files: Iterable[str], kind: str = "", *, opens_files: bool = True) -> str:
    """Return a hash of what the disk says about files, without reading all of them.

    Args:
        opens_files: False to look at sizes and times alone, of very many files.
    """
    digest = hashlib.blake2b(f"{_VERSION} {kind}".encode(), digest_size=16)
    for file in files:
        status = os.stat(file)
        facts = (os.path.abspath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        digest.update(json.dumps(facts).encode())
        if not opens_files:
            continue
        with open(file, "rb") as stream:
            digest.update(stream.read(_HEAD_BYTES))
            stream.seek(max(0, status.st_size - _HEAD_BYTES))
            digest.update(stream.read(_HEAD_BYTES))
    return digest.hexdigest()


def read_files(kind: str, files: Sequence[str], cache: Path) -> tuple[Path, InputDescription, str]:
    """Return the Arrow file of input files of one kind, made if it is missing; what was read; and the files' key.

    Raises:
        UnreadableInput: names the file, the place in it, and the way out; or the cache folder.
    """
    try:
        key = compute_files_key(files, kind)
    except OSError as error:
        raise UnreadableInput(f"{error.filename}: {error.strerror}") from None
    folder = cache / "dpgen" / key
    try:
        if not (folder / _DESCRIPTION_FILE).exists():
            with suppress(FileExistsError), fill_new_folder(folder) as new_folder:
                _fill(new_folder, kind, files, key)
        description = InputDescription.from_json((folder / _DESCRIPTION_FILE).read_text())
    except OSError as error:
        raise make_cache_error(cache, error) from None
    return folder / ARROW_FILE, description, key


def find_or_compute_fingerprint(key: str, cache: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the fingerprint of rows from the cache folder, or compute it and keep it there.

    A folder that can't be written costs the next start the time to compute it again.

    Args:
        key: of the files, of the rows that are selected of them, and of how these are hashed.
        compute: reads all rows.
    """
    file = cache / "dpgen" / f"fingerprint-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    try:
        kept = json.loads(file.read_bytes())
        if isinstance(kept, dict):
            return kept
    except (OSError, ValueError):
        logger.debug(f"{file} holds no fingerprint")
    fingerprint = compute()
    temporary = file.with_name(f".new-{file.stem}-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(fingerprint))
        temporary.rename(file)
    except OSError as error:
        logger.debug(f"can't write {file}: {error.strerror}")
    return fingerprint


def make_cache_error(cache: Path, error: OSError) -> UnreadableInput:
    """Return an error that names the cache folder and the variables that choose it."""
    return UnreadableInput(
        f"the cache folder {cache} can't be written: {error.strerror or error}. Free space, or choose another folder "
        "with HF_DATASETS_CACHE or HF_HOME"
    )


def describe_error(error: Exception, cache: Path) -> str:
    """Return the first line of the cause that `datasets` wraps in "An error occurred while generating the dataset"."""
    root: BaseException = error.__cause__ or error
    is_of_cache = isinstance(root, OSError) and (
        root.filename is None or Path(str(root.filename)).is_relative_to(cache.parent)
    )
    if isinstance(root, OSError) and is_of_cache and root.errno in _CACHE_ERRORS:
        return str(make_cache_error(cache, root))
    lines = str(root).strip().splitlines()
    return lines[0] if lines else type(root).__name__


def _fill(folder: Path, kind: str, files: Sequence[str], key: str) -> None:
    num_bytes = sum(os.path.getsize(file) for file in files)
    is_compressed = any(file.endswith((".gz", ".zst", ".bz2", ".xz", ".lz4")) for file in files)
    is_small = num_bytes <= _SMALL_BYTES and not is_compressed
    is_safe = kind in ("csv", "tsv", "text", BATCH_FORMAT) or (kind == "json" and is_small)
    description = None if is_safe else _convert_apart(kind, files, folder)
    if description is None:  # after a crash, too: Python's parser is slow, but reads the file, or names the line
        description = convert(kind, files, folder, may_crash=False)
    if compute_files_key(files, kind) != key:
        raise UnreadableInput("the files changed while they were read. Start again once they are complete")
    (folder / _DESCRIPTION_FILE).write_text(description.to_json())
    (folder / PLACE_FILE).unlink(missing_ok=True)


def _convert_apart(kind: str, files: Sequence[str], folder: Path) -> InputDescription | None:
    """Convert in a process of its own; return None if it crashed, and there is a parser that does not.

    Raises:
        UnreadableInput: as `convert` does, or because that process crashed.
        OSError: the folder can't be written.
    """
    request = {"kind": kind, "files": list(files), "folder": str(folder), "parent": os.getpid()}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        _CHILD,
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        start_new_session=True,  # the rank handles Ctrl-C
    )
    place_file = folder / PLACE_FILE
    place = os.fsdecode(place_file.read_bytes()) if place_file.exists() else files[0]
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        if kind == "json" and name != "SIGKILL":
            return None
        hint = "out of memory?" if name == "SIGKILL" else "the file may be damaged, or the reader has a fault"
        raise UnreadableInput(f"{place}: the reader crashed ({name}): {hint}")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines()
        raise UnreadableInput(f"{place}: the reader failed: {lines[-1] if lines else 'without a message'}") from None
    if "errno" in answer:
        raise OSError(answer["errno"], answer["strerror"])
    if "unreadable" in answer:
        raise UnreadableInput(answer["unreadable"])
    return InputDescription.from_json(answer["description"])
