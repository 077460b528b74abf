"""A folder is there as a whole or not at all, whoever fills it; what killed processes left is removed."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from dpgen.lifecycle import new_folder
from dpgen.lifecycle.new_folder import fill_new_folder

DAY_S = 24 * 3600


def fill(folder: Path, content: str = "rows", meanwhile: Callable[[Path], object] = lambda new_folder: None) -> None:
    with fill_new_folder(folder) as new_folder:
        (new_folder / "rows").write_text(content)
        meanwhile(new_folder)


def leave(folder: Path, idle_s: float, host: str | None = None) -> Path:
    """Leave what a process had filled when it was killed, last written `idle_s` seconds ago, as if on another host."""
    before = set(folder.parent.iterdir())
    pid = os.fork()
    if pid == 0:
        fill(folder, meanwhile=lambda new_folder: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(pid, 0)
    [leftover] = set(folder.parent.iterdir()) - before
    if host is not None:
        leftover = leftover.rename(leftover.with_name(f".new-{host}-{leftover.name.rpartition('-')[2]}"))
    make_old(leftover, idle_s)
    return leftover


def make_old(folder: Path, idle_s: float) -> None:
    time_s = folder.stat().st_mtime - idle_s
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time_s, time_s))


def test_a_folder_is_there_once_it_is_full_and_not_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "folder"
    with pytest.raises(ZeroDivisionError):
        fill(folder, meanwhile=lambda new_folder: 1 / 0)
    assert not any(folder.parent.iterdir())
    is_there: list[bool] = []
    fill(folder, meanwhile=lambda new_folder: is_there.append(folder.exists()))
    assert is_there == [False]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    assert [path.name for path in folder.iterdir()] == ["rows"]


def test_a_process_has_the_lock_though_another_one_looks_at_it_for_an_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_beside_another(path: Path, mode: str) -> IO[Any]:
        monkeypatch.undo()
        file, other = open(path, mode), open(path, "rb+")  # noqa: SIM115 - the caller, and the timer, close them
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.1, other.close).start()
        return file

    monkeypatch.setattr(new_folder, "open", open_beside_another, raising=False)
    with fill_new_folder(tmp_path / "folder") as folder, open(folder / new_folder._LOCK_FILE, "rb+") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_of_two_processes_the_first_one_wins(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(FileExistsError):
        fill(folder, "later rows", meanwhile=lambda new_folder: fill(folder))
    assert (folder / "rows").read_text() == "rows"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("host", "idle_s", "is_removed"),
    [
        (None, 60, True),
        (None, 0, False),
        ("other", DAY_S - 60, False),
        ("other", DAY_S + 60, True),
    ],
    ids=["killed-here", "maybe-not-locked-yet", "maybe-alive-there", "a-day-old"],
)
def test_what_a_killed_process_left_is_removed_by_the_next_one(
    tmp_path: Path, host: str | None, idle_s: float, is_removed: bool
) -> None:
    leftover = leave(tmp_path / "one", idle_s, host)
    fill(tmp_path / "two")
    assert leftover.exists() == (not is_removed)


def test_a_folder_that_is_still_filled_is_not_removed_however_old_it_is(tmp_path: Path) -> None:
    def fill_another(new_folder: Path) -> None:
        make_old(new_folder, 2 * DAY_S)
        fill(tmp_path / "two")

    fill(tmp_path / "one", meanwhile=fill_another)
    assert (tmp_path / "one" / "rows").read_text() == "rows"
