"""Wait for an engine's messages in the order in which it sends them while it starts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from dpgen.engine.handle import EngineHandle
from dpgen.engine.messages import EngineReady, Event, KvBytesMeasured, OptionsChecked
from dpgen.engine.progress_watch import ProgressWatch
from dpgen.errors import EngineError

E = TypeVar("E", OptionsChecked, KvBytesMeasured, EngineReady)

START_WAIT_S = 0.2  # while an engine starts, the other ranks are checked this often


class EarlyEvents:
    """Hold the messages that one life of an engine has sent, and that nobody has waited for yet.

    Args:
        watch: notices an engine that sends none.
    """

    def __init__(self, watch: ProgressWatch) -> None:
        self._watch = watch
        self._events: deque[Event] = deque()

    def clear(self) -> None:
        """Drop the messages of a life that has ended."""
        self._events.clear()

    def wait_for(self, kind: type[E], process: EngineHandle, on_wait: Callable[[], None]) -> E:
        """Return the next message, which must be of one kind.

        Args:
            on_wait: called again and again meanwhile.

        Raises:
            EngineError: the engine died, is silent for too long, or sends something else.
        """
        while True:
            on_wait()
            if not self._events:
                self._events += process.poll(START_WAIT_S)
            if self._events:
                event = self._events.popleft()
                self._watch.mark()
                if isinstance(event, kind):
                    return event
                cause = f"the engine sent {type(event).__name__} instead of {kind.__name__}"
                raise EngineError(cause, log_path=process.log_path)
            self._watch.raise_if_hung(process.log_path, is_ready=False, is_busy=False)
