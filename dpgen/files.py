"""The file operations that a row's safety hangs on, one method a system call.

They stand apart so that a test can fail each in turn, cut it short, or end the world after it.
"""

from __future__ import annotations

import os
from pathlib import Path


class Files:
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


def sync_folder(folder: Path) -> None:
    """`Files.sync_folder`, for those who need no other."""
    Files().sync_folder(folder)
