"""Show what a run does, on every channel: the progress on rank 0, status files, trackers, and a few rows at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from dpgen.config.schema import Config
from dpgen.formatting import escape_text
from dpgen.journal.run_dir import RunDir
from dpgen.monitoring.progress import ProgressDisplay
from dpgen.monitoring.status.page import format_rank_lines
from dpgen.monitoring.status.record import RankRecord
from dpgen.monitoring.status.reporter import PeerReader, RankReporter
from dpgen.monitoring.trackers import TrackerThread, open_trackers
from dpgen.records import Request
from dpgen.scheduling.progress.totals import Totals

logger = logging.getLogger(__name__)

_SHOWN_CHARS = 100
_DECODED_TOKENS = 4 * _SHOWN_CHARS  # a token of a few models is a byte, and some characters have four


class RunMonitor:
    """Show the generating part of one attempt.

    Args:
        num_rows: rows of the whole run.
        reporter: writes the rank's status files; its attempt has begun.
        is_rank_0: True on the rank that shows the whole run.
    """

    def __init__(
        self, config: Config, run_dir: RunDir, num_rows: int, reporter: RankReporter, *, is_rank_0: bool
    ) -> None:
        self._config, self._run_dir, self._num_rows, self._reporter = config, run_dir, num_rows, reporter
        self._is_rank_0 = is_rank_0
        reporter.tally.num_samples = config.run.show_rows if is_rank_0 else 0
        self._progress: ProgressDisplay | None = None
        self._num_before = 0
        self._peers: PeerReader | None = None
        self._trackers: TrackerThread | None = None

    def begin(self, num_before: int) -> None:
        """Open the progress on rank 0, and what else the configuration asks for there.

        Args:
            num_before: rows that earlier attempts have finished.
        """
        self._num_before = num_before
        if not self._is_rank_0:
            return
        run = self._config.run
        shows_ranks = run.progress == "ranks"
        self._progress = ProgressDisplay(
            self._num_rows, num_before, run.progress_interval_s, self._format_ranks if shows_ranks else None
        )
        self._progress.open_bar()
        if self._config.output.track and self._trackers is None:
            trackers = open_trackers(self._config, self._run_dir)
            self._trackers = TrackerThread(trackers)
            self._reporter.on_close = self._trackers.close
        if (shows_ranks or self._trackers) and self._peers is None:
            self._peers = PeerReader(self._run_dir.path)
        self._reporter.on_write = self._on_write

    def update(self, totals: Totals) -> None:
        """Show the totals of all ranks; never blocks."""
        self._reporter.update(totals, self._num_before + totals.num_rows)
        if self._progress is not None:
            self._progress.update(totals)

    def end(self) -> None:
        """Close the progress; safe to call twice."""
        if self._progress is not None:
            self._progress.close()

    def log_rows(self, build_request: Callable[[int], Request | None], decode: Any) -> None:
        """Log a few rows of rank 0, so that gibberish is seen at once.

        Args:
            build_request: returns a row's request once more; None if that can't be made.
            decode: returns the text of token ids; None where no tokenizer is at hand.
        """
        for sample in self._reporter.tally.samples if self._is_rank_0 else ():
            try:
                prompt = find_prompt_end(build_request(sample.row), decode)
            except Exception as error:  # noqa: BLE001 - foreign code: templates and tokenizers raise anything
                prompt = f"({type(error).__name__})"
            if sample.finish_reason is None and not sample.num_tokens:
                logger.info(f"row {sample.row}: {prompt} → {sample.text}")
                continue
            answer = _abbreviate(sample.text)
            reason = "" if sample.finish_reason is None else f"{sample.finish_reason}, "
            tokens = f"{reason}{sample.num_tokens:,} tokens"
            logger.info(f"row {sample.row}: {prompt} → {answer} ({tokens})")

    def _format_ranks(self, rates: Sequence[int]) -> list[str]:
        return list(format_rank_lines({} if self._peers is None else self._peers.records, rates))

    def _on_write(self, record: RankRecord) -> None:
        """Read the peers and feed the trackers, in the reporter's thread."""
        if self._peers is not None:
            self._peers(record)
        if self._trackers is not None:
            self._trackers.put(record, {} if self._peers is None else self._peers.records)


def find_prompt_end(request: Request | None, decode: Callable[[Sequence[int]], str] | None) -> str:
    """Return the end of a prompt as the model sees it, safe for a terminal; of a chat that only the engine can render,
    the end of its last message.
    """
    if request is None:
        return "(no prompt)"
    prompt: Any = request.prompt
    if request.prompt_token_ids is not None:
        if decode is None:
            return f"({len(request.prompt_token_ids):,} tokens)"
        prompt = decode(request.prompt_token_ids[-_DECODED_TOKENS:])
    if isinstance(prompt, dict) and "template_kwargs" in prompt:
        prompt = prompt["messages"][-1].get("content")
    text = prompt if isinstance(prompt, str) else str(prompt)
    return _abbreviate(text, is_end=True)


def _abbreviate(text: str, *, is_end: bool = False) -> str:
    shown = text[-_SHOWN_CHARS:] if is_end else text[:_SHOWN_CHARS]
    escaped = escape_text(shown)
    if len(shown) < len(text):
        escaped = f"...{escaped}" if is_end else f"{escaped}..."
    return f'"{escaped}"'
