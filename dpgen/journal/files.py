"""Wrap the system calls that make rows durable, one method per call.

- All of them go through one class, so that a test can fail, shorten or crash after each call in turn.
- A small file or a directory is published in full or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from dpgen.errors import DpgenError


class FileSystem:
    """Call the real operating system. Each method raises OSError as the system does."""

    def create(self, path: Path) -> int:
        """Create a file and return its descriptor for writing; FileExistsError if the name is taken."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        """Write a prefix of the data, possibly all of it, and return its number of bytes."""
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        """Wait until the file's content is on the disk."""
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def sync_path(self, path: Path) -> None:
        """Wait until the content of a file that other code wrote is on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove_directory(self, directory: Path) -> None:
        """Remove a directory with its content."""
        shutil.rmtree(directory)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def link(self, path: Path, other: Path) -> None:
        """Give a file a second name."""
        os.link(path, other)

    def replace(self, path: Path, final: Path) -> None:
        """Rename a file atomically, replacing any file of that name."""
        os.replace(path, final)

    def sync_directory(self, directory: Path) -> None:
        """Wait until the names of files created or renamed in a directory are on the disk."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def atomic_write_text(path: Path, text: str, files: FileSystem | None = None) -> None:
    """Write a small file so that a crash leaves the old content or the new content, never a part.

    Raises:
        DpgenError: the file can't be written.
    """
    files = files or FileSystem()
    # Processes of several nodes may write the same file, and in containers they have the same process ids.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        fd = files.create(temporary)
        try:
            rest = memoryview(text.encode("utf-8"))
            while rest:
                rest = rest[files.write(fd, rest) :]
            files.sync(fd)
        finally:
            files.close(fd)
        files.replace(temporary, path)
        files.sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DpgenError(f"{path} can't be written: {error.strerror}") from None


def publish_directory(temporary: Path, final: Path, files: FileSystem | None = None) -> None:
    """Give a directory its final name once its files are on the disk; a directory of that name is removed first.

    Raises:
        OSError: a system call fails.
    """
    files = files or FileSystem()
    for path in sorted(temporary.iterdir()):
        files.sync_path(path)
    files.sync_directory(temporary)
    if final.exists():
        files.remove_directory(final)
    files.replace(temporary, final)
    files.sync_directory(final.parent)
