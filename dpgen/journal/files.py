"""The file operations that a row's safety hangs on, one method a system call.

They stand apart so that a test can fail each in turn, cut it short, or end the world after it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dpgen.errors import DpgenError


class FileSystem:
    """The real ones. Each raises OSError as the system does."""

    def create(self, path: Path) -> int:
        """A new file's descriptor, for writing; FileExistsError if the name is taken."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        """Writes some of the data; how many bytes."""
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        """Waits until the file's content is on the disk."""
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def sync_path(self, path: Path) -> None:
        """Waits until the content of a file that others wrote is on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove_folder(self, folder: Path) -> None:
        """Removes a folder with all that is in it."""
        shutil.rmtree(folder)

    def link(self, path: Path, other: Path) -> None:
        """Gives a file a second name."""
        os.link(path, other)

    def replace(self, path: Path, final: Path) -> None:
        """Gives a file its final name, in one step, whatever had that name."""
        os.replace(path, final)

    def sync_folder(self, folder: Path) -> None:
        """Makes the names in a folder (files made or renamed there) outlast a crash."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def atomic_write_text(path: Path, text: str, files: FileSystem | None = None) -> None:
    """Writes a small file so that a crash leaves the old one or the new one, never a part.

    Raises:
        DpgenError: it can't be written.
    """
    files = files or FileSystem()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # ranks of one node may write the same file
    try:
        temporary.unlink(missing_ok=True)  # of a process of this number, which died
        fd = files.create(temporary)
        try:
            rest = memoryview(text.encode("utf-8"))
            while rest:
                rest = rest[files.write(fd, rest) :]
            files.sync(fd)
        finally:
            files.close(fd)
        files.replace(temporary, path)
        files.sync_folder(path.parent)
    except OSError as error:
        raise DpgenError(f"{path} can't be written: {error.strerror}") from None


def publish_directory(temporary: Path, final: Path, files: FileSystem | None = None) -> None:
    """Gives a folder its final name once all in it is on the disk; what had that name before goes.

    Raises:
        OSError: the disk refuses.
    """
    files = files or FileSystem()
    for path in sorted(temporary.iterdir()):
        files.sync_path(path)
    files.sync_folder(temporary)
    if final.exists():
        files.remove_folder(final)
    files.replace(temporary, final)
    files.sync_folder(final.parent)
