"""Define what prepares requests before the engine can take them, and stand in where there is nothing to prepare."""

from __future__ import annotations

from typing import Protocol

from dpgen.records import Request, RowResult


class PreparationQueue(Protocol):
    """Interface of a queue of requests that are being prepared; see `dpgen.engine.media.preparer`.

    Requests come out in the order in which they get ready.
    """

    max_ahead: int

    def __len__(self) -> int: ...

    @property
    def has_ready(self) -> bool: ...

    def poll(self) -> None: ...

    def add(self, request: Request) -> None: ...

    def take(self) -> Request | RowResult | None: ...

    def close(self) -> None: ...


class Preparer(Protocol):
    """Interface of what prepares requests; see `dpgen.engine.media.preparer.MediaPreparer`."""

    def needs(self, request: Request) -> bool: ...

    def open_queue(self) -> PreparationQueue: ...


class NoPreparer:
    """Prepare nothing: the engine takes requests as they are built."""

    max_ahead, has_ready = 0, False

    def __len__(self) -> int:
        return 0

    def needs(self, request: Request) -> bool:
        return False

    def open_queue(self) -> PreparationQueue:
        return self

    def poll(self) -> None:
        return

    def add(self, request: Request) -> None:
        raise NotImplementedError

    def take(self) -> Request | RowResult | None:
        return None

    def close(self) -> None:
        return
