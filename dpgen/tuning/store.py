"""Keep the results of finished trials in RUN_DIR/tuning, so that a search that was interrupted repeats none.

What was measured on another GPU, or with another vLLM, says nothing about this one: such results are left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpgen.config.environment import read_versions
from dpgen.config.schema import Config, to_sections
from dpgen.formatting import format_count
from dpgen.journal.files import atomic_write_text
from dpgen.simulation.hardware import read_gpu_name
from dpgen.tuning.trial import TrialResult

logger = logging.getLogger(__name__)

_FILE = "trials.json"
_FORM = 2  # of results; those of another form are left out


def compute_base(config: Config, num_ranks: int) -> str:
    """Return what stands for a job as it is configured: results of another one do not count."""
    sections = to_sections(config)
    del sections["run"], sections["output"]
    text = json.dumps([_FORM, sections, config.run.engine, num_ranks], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_machine() -> dict[str, str]:
    """Return what trials are made on: the GPU and vLLM's version, as far as there are any."""
    found = {"GPU": read_gpu_name(), "vLLM": read_versions().get("vllm")}
    return {name: value for name, value in found.items() if value is not None}


def read_results(folder: Path, base: str, machine: Mapping[str, str]) -> list[TrialResult]:
    """Return the results of finished trials, in order; none if there are none of this job and this machine."""
    try:
        content: Mapping[str, Any] = json.loads((folder / _FILE).read_bytes())
        if content["base"] != base:
            return []
        results, before = [TrialResult.from_json(fields) for fields in content["trials"]], dict(content["machine"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    if before == machine or not results:
        return results
    logger.info(
        f"{format_count(len(results), 'trial')} of an earlier start left out: measured on {_format_machine(before)}, "
        f"and this is {_format_machine(machine)}"
    )
    return []


def write_results(folder: Path, base: str, machine: Mapping[str, str], results: Sequence[TrialResult]) -> None:
    """Write the results of finished trials."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"base": base, "machine": dict(machine), "trials": [result.to_json() for result in results]}
    atomic_write_text(folder / _FILE, json.dumps(content, indent=1) + "\n")


def _format_machine(machine: Mapping[str, str]) -> str:
    return " with ".join(f"{name} {value}" for name, value in machine.items()) or "a machine without GPU and vLLM"
