"""Keep the results of finished trials in RUN_DIR/tuning, so that a search that was interrupted repeats none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpgen.config.schema import Config, to_sections
from dpgen.journal.files import atomic_write_text
from dpgen.tuning.trial import TrialResult

_FILE = "trials.json"


def compute_base(config: Config, num_ranks: int) -> str:
    """Return what stands for a job as it is configured: results of another one do not count."""
    sections = to_sections(config)
    del sections["run"], sections["output"]
    text = json.dumps([sections, config.run.engine, num_ranks], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_results(folder: Path, base: str) -> list[TrialResult]:
    """Return the results of finished trials, in order; none if there are none of this job."""
    try:
        content: Mapping[str, Any] = json.loads((folder / _FILE).read_bytes())
        return [TrialResult.from_json(fields) for fields in content["trials"]] if content["base"] == base else []
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def write_results(folder: Path, base: str, results: Sequence[TrialResult]) -> None:
    """Write the results of finished trials."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"base": base, "trials": [result.to_json() for result in results]}
    atomic_write_text(folder / _FILE, json.dumps(content, indent=1) + "\n")
