"""Answer the tasks of a worker that prepares media: read a prompt from a buffer, and write what became of it there."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpgen.data.media.policy import MediaPolicy
from dpgen.engine.media.buffers import Buffer, BufferAddress
from dpgen.errors import RowRefused


class PreparedPrompt(NamedTuple):
    """Hold a prompt with media as a worker makes it.

    Attributes:
        token_ids: of the whole prompt, those that stand for media included.
        parts: what the engine needs of the media, in the backend's own form.
    """

    token_ids: Sequence[int]
    parts: Sequence[Buffer]


@dataclass(frozen=True)
class PreparedAnswer:
    """Report that a prompt is prepared. Worker to rank.

    Attributes:
        token_ids: as of `PreparedPrompt`.
        num_bytes: that the buffer has now.
    """

    token_ids: array[int]
    num_bytes: int


@dataclass(frozen=True)
class RejectedAnswer:
    """Report the typed error of a row. Worker to rank."""

    type: str
    message: str


HandleFn = Callable[[BufferAddress], PreparedAnswer | RejectedAnswer]


def encode_prompt(prompt: Any, policy: MediaPolicy) -> list[Buffer]:
    """Return a prompt, and what may be loaded for it, as the contents of a buffer."""
    return [pickle.dumps((prompt, policy), pickle.HIGHEST_PROTOCOL)]


def make_handler(
    prepare: Callable[[Any, MediaPolicy], PreparedPrompt],
) -> HandleFn:
    """Return the handler of a worker's tasks.

    Args:
        prepare: prepares one prompt; raises RowRefused for what can't be prepared.
    """

    def handle(address: BufferAddress) -> PreparedAnswer | RejectedAnswer:
        [data] = address.read()
        prompt, policy = pickle.loads(data)
        del data  # the file is written anew
        try:
            prepared = prepare(prompt, policy)
        except RowRefused as error:
            return RejectedAnswer(error.type, error.message)
        return PreparedAnswer(array("i", prepared.token_ids), address.write(prepared.parts))

    return handle
