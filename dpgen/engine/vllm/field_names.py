"""Know the names of vLLM's fields, and find those of a configuration that it doesn't know.

- The engine process has the names from vLLM itself. `read_vllm_fields` reads them in vLLM's source, in milliseconds and
  without loading CUDA, for commands that start no engine.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpgen.config.environment import read_versions
from dpgen.config.vllm.vllm_fields import describe_unknown_field
from dpgen.engine.messages import EngineSpec
from dpgen.engine.vllm.versions import describe_version

# Fields of SamplingParams that belong to dpgen: how results come back, and vLLM's own bookkeeping.
_RESERVED_SAMPLING_FIELDS = {
    *("output_kind", "skip_clone", "output_text_buffer_length", "stream_interval", "flat_logprobs"),
}


@dataclass(frozen=True)
class VllmFields:
    """Hold the names of fields.

    Attributes:
        engine: of EngineArgs.
        sampling: of SamplingParams.
        constraints: of StructuredOutputsParams.
    """

    engine: Set[str]
    sampling: Set[str]
    constraints: Set[str]

    def find_unknown(self, spec: EngineSpec) -> Iterator[str]:
        """Yield one line for each key of `engine`, `sampling` and `sampling_by_rank` that vLLM doesn't know."""
        version = read_versions().get("vllm")
        sampling, constraints = self._own_sampling, self._own_constraints
        for name in spec.options:
            if name not in self.engine:
                yield describe_version("engine", name, version) or describe_unknown_field(
                    "engine", name, self.engine, sampling
                )
        for section, name in spec.iter_sampling_names():
            if name not in sampling:
                yield describe_version(section, name, version) or describe_unknown_field(
                    section, name, sampling, self.engine
                )
        for section, entry in spec.iter_sampling_sections():
            given = entry.get("structured_outputs")
            for name in given if isinstance(given, dict) else ():  # vLLM ignores those that it doesn't know
                if name not in constraints:
                    yield describe_unknown_field(f"{section}.structured_outputs", str(name), constraints)

    def find_unknown_of_request(self, sampling: Mapping[str, Any]) -> str | None:
        """Return a line about a field of one request that vLLM doesn't know; None if it knows all.

        Names come from the calls of rows' programs, and from constraints in columns.
        """
        for name in sampling.keys() - self._own_sampling:
            return describe_unknown_field("sampling", str(name), self._own_sampling, self.engine)
        given = sampling.get("structured_outputs")
        for name in given.keys() - self._own_constraints if isinstance(given, dict) else ():
            return describe_unknown_field("structured_outputs", str(name), self._own_constraints)
        return None

    @functools.cached_property
    def _own_sampling(self) -> Set[str]:
        """Return the fields of SamplingParams that users may set."""
        return {name for name in self.sampling if not name.startswith("_")} - _RESERVED_SAMPLING_FIELDS

    @functools.cached_property
    def _own_constraints(self) -> Set[str]:
        return {name for name in self.constraints if not name.startswith("_")}


def read_vllm_fields() -> VllmFields | None:
    """Return the names in the source of the installed vLLM; None if there is none, or none that can be read."""
    package = find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(next(iter(package.submodule_search_locations)))
    try:
        engine = _read_class(folder / "engine" / "arg_utils.py", "EngineArgs")
        sampling = _read_class(folder / "sampling_params.py", "SamplingParams")
        constraints = _read_class(folder / "sampling_params.py", "StructuredOutputsParams")
    except (OSError, SyntaxError, LookupError):
        return None
    return VllmFields(engine, sampling, constraints)


def _read_class(path: Path, name: str) -> set[str]:
    """Return the annotated names in the body of a class."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    raise LookupError(f"{path} has no class {name}")
