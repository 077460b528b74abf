"""Run one row's program on the event loop: number its calls, answer those that are known, and end it.

- A call's place is the number of the call in its task; a task's place is a number there, too. Places depend on the
  program alone, not on which of several calls is answered first. Tasks that callbacks begin are numbered apart: when a
  callback runs depends on whether the calls before it had to wait.
- A call that the journal has is answered at once, if it asks the same. If it asks something else, it is asked anew.
- A program ends once: with a result, with what it raised, or with the limit that it has exceeded. What it still runs
  then is cancelled.
"""

from __future__ import annotations

import asyncio
import copy
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from dpgen.errors import ERROR_TYPES
from dpgen.formatting import describe_type
from dpgen.journal.calls import AskedText, FinishedCall
from dpgen.programs.handle import CallFailed, Llm, ModelCall
from dpgen.records import Completion, RequestId, RowError, RowResult

_OWN_FILES = ("dpgen/programs/handle.py", "dpgen/scheduling/programs/", "dpgen/journal/calls.py")
_MAX_MESSAGE_CHARS = 500


class ProgramBlocked(BaseException):
    """Interrupt a program that keeps the event loop from all others; raised in it by the rank's main thread."""


@dataclass(frozen=True)
class AskedCall:
    """Ask the engine. Event loop to main thread."""

    id: RequestId
    place: str
    asked: AskedText
    call: ModelCall


@dataclass(frozen=True)
class ToolReturned:
    """Report what a tool has returned, to be journaled. Event loop to main thread."""

    finished: FinishedCall


@dataclass(frozen=True)
class Diverged:
    """Report a call that asks something else than it did before. Event loop to main thread."""

    row: int
    place: str
    difference: str


@dataclass(frozen=True)
class ProgramEnded:
    """Report the result of a row. Event loop to main thread."""

    result: RowResult


Message = AskedCall | ToolReturned | Diverged | ProgramEnded


@dataclass(frozen=True)
class ProgramSpec:
    """Describe the program of a run.

    Attributes:
        function: gets the row as a dict and the handle, and returns an awaitable.
        options: `program.options`.
        timeout_s, max_calls: `program.timeout_s`, `program.max_calls`.
        check_result: raises ValueError for a dict that `program.returns` does not describe.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0
    max_calls: int = 100
    check_result: Callable[[dict[str, Any]], object] = lambda value: None


class Host(Protocol):
    """Interface of the event loop, as a program uses it; see `ProgramLoop`."""

    spec: ProgramSpec

    def send(self, message: Message) -> None: ...

    async def run_function(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any: ...


@dataclass
class _Branch:
    """Number the calls and tasks of one task.

    Attributes:
        prefix: of the places in it: "" for the program itself, "2." for the task begun as its third.
        num_callback_tasks: begun by callbacks, e.g. to close an async generator; "c0." for the first.
    """

    program: RunningProgram
    prefix: str = ""
    num_places: int = 0
    num_callback_tasks: int = 0

    def take_place(self) -> str:
        self.num_places += 1
        return f"{self.prefix}{self.num_places - 1}"

    def take_place_of_callback(self) -> str:
        self.num_callback_tasks += 1
        return f"{self.prefix}c{self.num_callback_tasks - 1}"


_branch: ContextVar[_Branch] = ContextVar("branch")

# Tasks that have not ended, those of a closed loop included. Nothing else holds a task that waits for ever. If it were
# collected as garbage, in any thread, its coroutine would be closed there, and one that catches all would never return.
_unfinished: set[asyncio.Task[Any]] = set()


def make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, context: Any = None, **others: Any) -> Any:
    """Make a task; the task factory of the event loop. A task that a program begins gets a place in it."""
    branch = _branch.get(None)
    if branch is None or (context is not None and context.get(_branch) is not branch):
        return _keep(asyncio.Task(coroutine, loop=loop, context=context, **others))
    context = copy_context() if context is None else context.copy()
    place = branch.take_place_of_callback() if asyncio.current_task(loop) is None else branch.take_place()
    context.run(_branch.set, _Branch(branch.program, f"{place}."))
    task = _keep(asyncio.Task(coroutine, loop=loop, context=context, **others))
    branch.program.tasks.add(task)
    return task


def _keep(task: asyncio.Task[Any]) -> asyncio.Task[Any]:
    """Hold a task until it has ended."""
    _unfinished.add(task)
    task.add_done_callback(_unfinished.discard)
    return task


def number_call(place: str) -> int:
    """Return the number of a call for its id: its place where that is one, else a hash of it beyond all of these."""
    if "." not in place:
        return int(place)
    return 1 << 56 | int.from_bytes(blake2b(place.encode("ascii"), digest_size=7).digest(), "little")


class RunningProgram:
    """Run the program of one row; the `Port` of its handle. Only the event loop's thread uses it.

    Args:
        attempt: of the ids of its calls.
        known: the calls that earlier lives have finished.
        seed: of the handle's `random`.

    Attributes:
        tasks: those that the program has begun, itself included.
        num_tools: functions that run for it.
    """

    def __init__(self, row: int, attempt: int, known: Sequence[FinishedCall], seed: int, host: Host) -> None:
        self.row, self._attempt, self._seed, self._host = row, attempt, seed, host
        self._known = {call.place: call for call in known}
        self._waiting: dict[RequestId, asyncio.Future[RowResult]] = {}
        self._num_calls = self._num_prompt_tokens = self._num_generated_tokens = self.num_tools = 0
        self._is_ended = False
        self._timer: asyncio.TimerHandle | None = None
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._root: asyncio.Task[None] | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, columns: Mapping[str, Any]) -> None:
        """Begin the program, given its row."""
        context = copy_context()
        context.run(_branch.set, _Branch(self))
        self._timer = loop.call_later(self._host.spec.timeout_s, self._time_out)
        self._root = loop.create_task(self._run(dict(columns)), context=context)
        self.tasks.add(self._root)

    def deliver(self, result: RowResult) -> None:
        """Answer a call."""
        future = self._waiting.pop(result.id, None)
        if future is not None and not future.done():
            future.set_result(result)

    def cancel(self) -> None:
        """End the program without a result."""
        self._is_ended = True
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self.tasks):
            task.cancel()

    async def ask(self, call: ModelCall) -> RowResult:
        """Return the model's result of a call; see `Port`."""
        place = await self._take_place()
        options = {"kind": call.kind, "template": call.template, "sampling": call.sampling}
        asked = AskedText.of([call.prompt, call.completion, options])
        result = await self._recall(place, asked)
        if result is None:
            id = RequestId(self.row, number_call(place), 0, self._attempt)
            self._waiting[id] = future = asyncio.get_running_loop().create_future()
            self._host.send(AskedCall(id, place, asked, call))
            result = await future
        self._num_prompt_tokens += result.num_prompt_tokens or 0
        self._num_generated_tokens += result.num_generated_tokens
        if result.error is not None:
            raise CallFailed(result.error.type, f"call {place}: {result.error.message}")
        return result

    async def run_tool(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a function of the user returns; see `Port`."""
        place = await self._take_place()
        name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"
        result = await self._recall(place, asked := AskedText.of(["tool", name, list(args), dict(kwargs)]))
        if result is None:
            result = await self._call_function(place, function, args, kwargs)
            result = result.with_id(RequestId(self.row, number_call(place), 0, self._attempt))
            self._host.send(ToolReturned(FinishedCall(place, asked, result)))
        if result.error is not None:
            raise CallFailed(result.error.type, f"call {place}: {result.error.message}")
        return json.loads(result.completions[0].text)

    async def _call_function(
        self, place: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> RowResult:
        self.num_tools += 1
        branch = _branch.get()
        _branch.set(_Branch(self, f"{place}."))  # what an async function begins is not there in the next life
        try:
            value = await self._host.run_function(function, args, kwargs)
        except ProgramBlocked:
            raise
        except BaseException as error:  # foreign code: what it raises is the program's to handle
            if isinstance(error, asyncio.CancelledError) and self._is_cancelled():
                raise
            return RowResult(self.row, error=RowError("tool_failed", describe_exception(error)))
        finally:
            _branch.set(branch)
            self.num_tools -= 1
        try:
            return RowResult(self.row, completions=(Completion(to_json(value), None, 0),))
        except Exception as error:  # noqa: BLE001 - foreign code, too: it may be any object
            return RowResult(self.row, error=RowError("tool_failed", _describe_bad_value(error)))

    @staticmethod
    def _is_cancelled() -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0  # else a function has raised CancelledError by itself

    async def _take_place(self) -> str:
        branch = _branch.get(None)
        if branch is None or branch.program is not self:
            raise RuntimeError("llm belongs to another row's program, or to none")
        self._num_calls += 1
        if self._num_calls > (limit := self._host.spec.max_calls):
            self._end(RowError("program_too_many_calls", f"it makes more calls than program.max_calls={limit}"))
        if self._is_ended:  # a program that catches all, cancellations included, waits here
            await asyncio.get_running_loop().create_future()
        return branch.take_place()

    async def _recall(self, place: str, asked: AskedText) -> RowResult | None:
        """Return the result that an earlier life has of a call; None if it has none, or asked something else."""
        known = self._known.pop(place, None)
        if known is None:
            return None
        if known.asked.digest != asked.digest:
            self._host.send(Diverged(self.row, place, known.asked.describe_difference(asked)))
            return None
        await asyncio.sleep(0)  # tasks that the program has begun run, as they did while this call was answered
        return known.result

    # ---- the end

    async def _run(self, columns: dict[str, Any]) -> None:
        spec = self._host.spec
        try:
            value = await spec.function(columns, Llm(self.row, self._seed, self), **copy.deepcopy(dict(spec.options)))
            outcome: RowResult | RowError = self._make_result(value)
        except BaseException as error:  # noqa: BLE001 - foreign code: it may raise anything, SystemExit included
            outcome = _make_error(error)
        self._end(outcome)

    def _make_result(self, value: Any) -> RowResult | RowError:
        try:
            if not isinstance(value, Mapping):
                raise ValueError(f"it returned {describe_type(value)}, and must return a dict of columns")
            text = to_json(dict(value))
            self._host.spec.check_result(json.loads(text))
        except Exception as error:  # noqa: BLE001 - foreign code: it may be a mapping of the user's own
            return RowError("program_bad_result", _describe_bad_value(error))
        done = Completion("", None, self._num_generated_tokens, parsed=text)
        return RowResult(self.row, self._num_prompt_tokens, (done,), num_calls=self._num_calls)

    def _time_out(self) -> None:
        limit = self._host.spec.timeout_s
        self._end(RowError("program_timeout", f"it took longer than program.timeout_s={limit:g}"))

    def _end(self, outcome: RowResult | RowError) -> None:
        if self._is_ended:
            return
        self.cancel()
        result = outcome if isinstance(outcome, RowResult) else RowResult(self.row, error=outcome)
        self._host.send(ProgramEnded(result))


def _make_error(error: BaseException) -> RowError:
    """Return the error of a row whose program has raised something."""
    while isinstance(error, BaseExceptionGroup):  # of an asyncio.TaskGroup
        error = error.exceptions[0]
    if isinstance(error, ProgramBlocked):
        why = "it blocked the event loop, and all other programs with it: call what takes long by llm.tool"
        return RowError("program_timeout", why)
    if isinstance(error, CallFailed) and error.type in ERROR_TYPES:
        return RowError(error.type, _shorten(str(error.message)))
    return RowError("program_failed", describe_exception(error))


def to_json(value: Any) -> str:
    """Return a value as JSON text; numbers and arrays of numpy as those of Python.

    Raises:
        TypeError, ValueError, RecursionError: JSON can't hold it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_to_plain)
    except ValueError as error:
        if "Out of range float" in str(error):
            raise ValueError("it returned NaN or infinity, which is no value of JSON; return null for it") from None
        raise


def _describe_bad_value(error: Exception) -> str:
    """Return why a value is none of JSON."""
    is_own = isinstance(error, (TypeError, ValueError, RecursionError))
    return _shorten(_to_text(error)) if is_own else describe_exception(error)


def _to_plain(value: Any) -> Any:
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    hint = "; use its text" if type(value).__name__ == "ModelAnswer" else ""
    raise TypeError(f"it returned {describe_type(value)}, which is no value of JSON{hint}")


def describe_exception(error: BaseException) -> str:
    """Return what was raised, and the last frame of its traceback outside of dpgen's own machinery."""
    what = _shorten(f"{type(error).__name__}: {' '.join(_to_text(error).split())}".rstrip(": "))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(own in Path(frame.filename).as_posix() for own in _OWN_FILES)
    ]
    if not frames:
        return what
    return f"{what} ({Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name})"


def _to_text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:  # noqa: BLE001 - foreign code: the message is the user's own
        return f"its text can't be made: {type(other).__name__}"


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE_CHARS else f"{text[: _MAX_MESSAGE_CHARS - 3]}..."
