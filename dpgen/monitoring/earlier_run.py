"""Read what an earlier run has measured: how long its completions were, and how fast its engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.errors import ConfigError
from dpgen.journal.reader import JournalIndex, JournalReader, index_journal
from dpgen.journal.run_dir import RunDir

_MAX_ROWS_READ = 2_000


@dataclass(frozen=True)
class EarlierRun:
    """Hold the measurements of a run, finished or not.

    Attributes:
        model: as its configuration names it.
        num_done: rows with a result, or an error.
        lengths: generated tokens of some completions, int64[n].
        samples_per_row: completions of a sound row, on average.
        busy_s, num_rows, num_prompt_tokens, num_generated_tokens: of each rank that generated rows; empty where the run
            has not gathered its result yet.
        num_ranks: length of these.
        max_num_seqs: sequences that the engines of each rank ran at a time; None where unknown.
        kv_tokens: tokens that its KV cache held; None where unknown.
    """

    path: Path
    model: str
    num_done: int
    lengths: np.ndarray
    samples_per_row: float = 1.0
    busy_s: tuple[float, ...] = ()
    num_rows: tuple[int, ...] = ()
    num_prompt_tokens: tuple[int, ...] = ()
    num_generated_tokens: tuple[int, ...] = ()
    max_num_seqs: int | None = None
    kv_tokens: int | None = None

    @property
    def num_ranks(self) -> int:
        return len(self.busy_s)


def read_earlier_run(path: str) -> EarlierRun | None:
    """Return what a run directory tells; None if there is no run in it, or none with a row.

    Raises:
        ConfigError: there is a file in place of the directory.
        DpgenError: run.json, or the journal, is damaged.
    """
    run_dir = RunDir(path)
    metadata = run_dir.read_metadata()
    index = index_journal(run_dir.journal)
    if not metadata or not len(index):
        return None
    ranks = [rank for rank in metadata.get("manifests") or [] if rank.get("busy_s", 0) > 0]
    engine: Mapping[str, Any] = metadata.get("engine") or {}
    num_engines = (metadata.get("engines_per_rank") or {}).get("number") or 1
    return EarlierRun(
        run_dir.path,
        str((metadata.get("identity") or {}).get("model", "")),
        len(index),
        *_read_lengths(index),
        tuple(float(rank["busy_s"]) for rank in ranks),
        tuple(int(rank["num_rows"]) for rank in ranks),
        tuple(int(rank["num_prompt_tokens"]) for rank in ranks),
        tuple(int(rank["num_generated_tokens"]) for rank in ranks),
        (engine.get("max_num_seqs") or 0) * num_engines or None,
        (engine.get("num_kv_blocks") or 0) * (engine.get("kv_block_tokens") or 0) * num_engines or None,
    )


def _read_lengths(index: JournalIndex) -> tuple[np.ndarray, float]:
    """Return the lengths of completions, and how many a row has."""
    sound = np.flatnonzero(~index.error)
    if len(sound) > _MAX_ROWS_READ:
        sound = np.sort(np.random.default_rng(0).choice(sound, _MAX_ROWS_READ, replace=False))
    with JournalReader(index) as reader:
        results = [result for batch in reader.iter_batches(sound) for result in batch]
    lengths = [completion.num_tokens for result in results for completion in result.completions]
    return np.array(lengths, dtype=np.int64), max(1.0, len(lengths) / max(1, len(results)))


def find_earlier_run(run_dir: str, calibrate: str | None) -> EarlierRun | None:
    """Return the run that `--calibrate` names, or else the one in the run directory; None if there is none.

    Raises:
        ConfigError: `--calibrate` names no run with results.
    """
    if calibrate is None:
        return read_earlier_run(run_dir)
    found = read_earlier_run(calibrate)
    if found is None:
        raise ConfigError(f"--calibrate={calibrate}: there is no run directory with finished rows")
    return found
