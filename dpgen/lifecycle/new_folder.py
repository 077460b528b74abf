"""Fill folders that are there as a whole or not at all, on a disk that many hosts may share.

- A folder is filled beside its place under a name of its own, and renamed. Of several processes the first one wins.
- A process that was killed leaves what it has filled. The next one that fills a folder there removes it: at once where
  its lock shows that the owner, on the same host, has ended; a day after the last write where locks may not reach.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".new-"
_LOCK_FILE = ".dpgen-lock"
_SETTLED_S = 10  # for an owner to lock its folder
_ABANDONED_S = 24 * 3600


@contextmanager
def fill_new_folder(folder: Path) -> Iterator[Path]:
    """Give the block a folder to fill, which becomes `folder` at its end.

    Raises:
        FileExistsError: another process was faster; its folder stays.
        OSError: the folder can't be written.
    """
    temporary = folder.with_name(f"{_PREFIX}{socket.gethostname()}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        with open(temporary / _LOCK_FILE, "wb") as lock:
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # who looks for what others left holds it for an instant
            _remove_abandoned(folder.parent, temporary.stat().st_mtime)
            yield temporary
            (temporary / _LOCK_FILE).unlink()
            temporary.rename(folder)
    except OSError as error:
        raise (
            FileExistsError(errno.EEXIST, "it is there already", str(folder)) if folder.is_dir() else error
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(parent: Path, now_s: float) -> None:
    for leftover in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another process removes or publishes it
            idle_s = now_s - max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
            if _is_abandoned(leftover, idle_s):
                shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(leftover: Path, idle_s: float) -> bool:
    """Return True if the owner of a folder has ended.

    Args:
        idle_s: seconds since the last write, by the clock of the disk.
    """
    is_of_this_host = leftover.name.rpartition("-")[0] == f"{_PREFIX}{socket.gethostname()}"
    try:
        with open(leftover / _LOCK_FILE, "rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # it has none, or the file system none at all
        is_of_this_host = False
    return idle_s > (_SETTLED_S if is_of_this_host else _ABANDONED_S)
