"""Choose which of a rank's engines generates a request.

- The engine with the fewest sequences for its size gets the request, so that all run out of rows together.
- Rows that begin the same, or that have the same adapter, stay on one engine while that costs no balance: it has their
  prefix in its cache, and the adapter in use.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping

from dpgen.engine.messages import EngineSpec
from dpgen.records import Request, RequestId

_SLACK = 0.125  # of an engine's size, by which it may be fuller than another for the sake of a prefix
_PREFIX_TOKENS, _PREFIX_CHARS = 64, 256
_MAX_PREFIXES = 4096


class RequestRouter:
    """Route requests, and count the sequences that each engine has.

    Args:
        num_samples: sequences of a row that gives no number of its own.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._placed: dict[RequestId, tuple[int, int]] = {}  # (engine, sequences)
        self._num_seqs: dict[int, int] = {}
        self._num_requests: Counter[int] = Counter()  # of each row that has some
        self._engine_of_prefix: OrderedDict[Hashable, int] = OrderedDict()

    def count(self, engine: int) -> int:
        """Return the sequences of an engine."""
        return self._num_seqs.get(engine, 0)

    @property
    def seqs_per_row(self) -> float:
        """Sequences that a row has at a time: its samples, or those of the calls that its program makes together."""
        return sum(self._num_seqs.values()) / len(self._num_requests) if self._num_requests else self._num_samples

    def place(self, request: Request, sizes: Mapping[int, int]) -> int:
        """Choose an engine for a request, and return its number.

        Args:
            sizes: sequences that each engine which may get requests runs at a time, by its number.
        """
        loads = {engine: self.count(engine) / max(1, size) for engine, size in sizes.items()}
        engine = min(loads, key=lambda engine: (loads[engine], engine))
        if len(sizes) > 1:
            prefix = _find_prefix(request)
            usual = self._engine_of_prefix.pop(prefix, engine)
            if usual in loads and loads[usual] <= loads[engine] + _SLACK:
                engine = usual
            self._engine_of_prefix[prefix] = engine
            if len(self._engine_of_prefix) > _MAX_PREFIXES:
                self._engine_of_prefix.popitem(last=False)
        num_seqs = request.sampling.get("n", self._num_samples)
        self._placed[request.id] = engine, max(1, num_seqs) if isinstance(num_seqs, int) else 1
        self._num_seqs[engine] = self.count(engine) + self._placed[request.id][1]
        self._num_requests[request.row] += 1
        return engine

    def find(self, id: RequestId) -> int:
        """Return the engine that has a request."""
        return self._placed[id][0]

    def remove(self, id: RequestId) -> None:
        """Note that an engine has finished a request, or given it up."""
        if (placed := self._placed.pop(id, None)) is not None:
            engine, num_seqs = placed
            self._num_seqs[engine] -= num_seqs
            self._num_requests[id.row] -= 1
            if not self._num_requests[id.row]:
                del self._num_requests[id.row]


def _find_prefix(request: Request) -> Hashable:
    if request.prompt_token_ids is not None:
        return request.adapter, tuple(request.prompt_token_ids[:_PREFIX_TOKENS])
    return request.adapter, str(request.prompt)[:_PREFIX_CHARS]


def count_samples(spec: EngineSpec) -> int:
    """Return how many sequences each request of the run is, unless it says so itself."""
    num_samples = spec.sampling.get("n") or 1
    return num_samples if isinstance(num_samples, int) else 1
