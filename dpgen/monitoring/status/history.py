"""Keep what a rank did over time: RUN_DIR/status/rank-N.history.jsonl, one JSON object a line, oldest first.

- A line at each change of phase, and at the end of each step of one ("is_change": true, "step"). Samples every few
  seconds in between.
- The file is bounded. When it has `MAX_LINES` lines, every other sample is removed, and samples come half as often from
  then on. Changes of phase stay; only where they alone fill half of the file do the oldest lines go.
- All attempts of the rank are in one file. `time` is by the rank's own clock, and `elapsed_s` counts monotonically from
  the start of the rank's process.
- Counts that are 0 or unknown are left out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpgen.monitoring.status.record import replace_file

MAX_LINES = 1_000
MIN_SAMPLE_INTERVAL_S = 5.0

Sample = Mapping[str, Any]


class History:
    """Append to one rank's history; keeps its lines in memory, 250 KB at most.

    Args:
        path: the file. Earlier attempts' lines in it are kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._samples = read_history(path)
        self._needs_rewrite = not _ends_with_line_feed(path)
        self.sample_interval_s = MIN_SAMPLE_INTERVAL_S
        self._last_sample_s = -self.sample_interval_s

    def is_due(self, elapsed_s: float) -> bool:
        """Return True if the next sample is due."""
        return elapsed_s - self._last_sample_s >= self.sample_interval_s

    def append(self, samples: Sequence[Sample]) -> None:
        """Add samples to the file.

        Raises:
            OSError: a system call fails. The samples are kept, and written with later ones.
        """
        if not samples:
            return
        self._samples += [_drop_empty(sample) for sample in samples]
        self._last_sample_s = max(
            [self._last_sample_s, *(sample["elapsed_s"] for sample in samples if not sample.get("is_change"))]
        )
        if len(self._samples) > MAX_LINES:
            self._samples, self._needs_rewrite = thin_out(self._samples), True
            self.sample_interval_s *= 2
        if self._needs_rewrite:
            replace_file(self._path, "".join(map(_encode, self._samples)))
            self._needs_rewrite = False
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_encode, self._samples[-len(samples) :])))
        except OSError:
            self._needs_rewrite = True  # a part of the lines may be there
            raise


def thin_out(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples without every other one of those between changes of phase, and at most half of `MAX_LINES`.

    The newest sample stays.
    """
    kept: list[Sample] = []
    is_kept = True
    for sample in samples[:-1]:
        if sample.get("is_change"):
            kept.append(sample)
            is_kept = True
            continue
        is_kept = not is_kept
        if is_kept:
            kept.append(sample)
    kept.append(samples[-1])
    num_changes = sum(bool(sample.get("is_change")) for sample in kept)
    if num_changes > MAX_LINES // 4:
        return kept[-MAX_LINES // 2 :]
    return kept


def read_history(path: Path) -> list[Sample]:
    """Return a rank's history, oldest first; lines that can't be read are left out."""
    samples: list[Sample] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return samples
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            sample = json.loads(line)
            if isinstance(sample, dict):
                samples.append(sample)
    return samples[-MAX_LINES:]


def _ends_with_line_feed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            if not file.tell():
                return True
            file.seek(-1, 2)
            return file.read(1) == b"\n"
    except OSError:
        return True  # there is no file yet


def _drop_empty(sample: Sample) -> Sample:
    return {key: value for key, value in sample.items() if key == "elapsed_s" or value not in (None, 0, False)}


def _encode(sample: Sample) -> str:
    return json.dumps(sample, separators=(",", ":")) + "\n"
