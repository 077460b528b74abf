"""Provide a disk under the journal's system calls that fails on demand and forgets unsynced data."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dpgen.journal.files import FileSystem


class Crash(BaseException):
    """Stand for a power failure: nothing runs afterwards."""


class FailingDisk(FileSystem):
    """Behave like the real disk until call number `at`.

    Args:
        how: an errno's name such as "ENOSPC": the call fails with it and does nothing. "short": the call writes half
            of its data. "before", "after": power is lost before or after the call. None: nothing happens.
    """

    def __init__(self, at: int = -1, how: str | None = None) -> None:
        self.at, self.how = at, how
        self.calls: list[str] = []
        self.is_off = False
        self._paths: dict[int, Path] = {}
        self._synced_bytes: dict[Path, int] = {}
        self._synced_names: set[Path] = set()

    def lose_power(self, kept: float, filler: bytes | None = None) -> None:
        """Leave on the disk what a crash may leave.

        Args:
            kept: the fraction of the unsynced bytes that survives.
            filler: what those bytes are replaced with; None to keep them as written.
        """
        self.is_off = True
        for path, synced in self._synced_bytes.items():
            if path not in self._synced_names:
                path.unlink(missing_ok=True)
                continue
            content = path.read_bytes()
            end = synced + int((len(content) - synced) * kept)
            tail = content[synced:end] if filler is None else filler * (end - synced)
            path.write_bytes(content[:synced] + tail)

    def create(self, path: Path) -> int:
        self._begin("create")
        fd = super().create(path)
        self._paths[fd] = path
        self._synced_bytes[path] = 0
        self._end()
        return fd

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> int:
        is_short = self._begin("write") == "short"
        written = super().write(fd, data[: max(1, len(data) // 2)] if is_short else data)
        self._end()
        return written

    def sync(self, fd: int) -> None:
        self._begin("sync")
        super().sync(fd)
        self._synced_bytes[self._paths[fd]] = os.fstat(fd).st_size
        self._end()

    def close(self, fd: int) -> None:
        if self.is_off:
            return super().close(fd)  # cleaning up after a process that is dead
        self._begin("close")
        super().close(fd)
        return self._end()

    def remove(self, path: Path) -> None:
        self._begin("remove")
        super().remove(path)
        self._end()

    def sync_path(self, path: Path) -> None:
        self._begin("sync_path")
        super().sync_path(path)
        self._end()

    def remove_directory(self, directory: Path) -> None:
        self._begin("remove_directory")
        super().remove_directory(directory)
        self._end()

    def link(self, path: Path, other: Path) -> None:
        self._begin("link")
        super().link(path, other)
        self._end()

    def replace(self, path: Path, final: Path) -> None:
        self._begin("replace")
        super().replace(path, final)
        if path in self._synced_bytes:  # a rename may reach the disk early or late; callers survive both
            self._synced_bytes[final] = self._synced_bytes.pop(path)
            self._synced_names.add(final)
        self._end()

    def sync_directory(self, directory: Path) -> None:
        self._begin("sync_directory")
        super().sync_directory(directory)
        self._synced_names |= {path for path in self._synced_bytes if path.parent == directory}
        self._end()

    def _begin(self, name: str) -> str | None:
        if self.is_off:
            raise Crash
        self.calls.append(name)
        if len(self.calls) - 1 != self.at or self.how in (None, "after"):
            return None
        if self.how == "before":
            self.is_off = True
            raise Crash
        if self.how == "short":
            return self.how
        number = getattr(errno, str(self.how))
        raise OSError(number, os.strerror(number))

    def _end(self) -> None:
        if len(self.calls) - 1 == self.at and self.how == "after":
            self.is_off = True
            raise Crash
