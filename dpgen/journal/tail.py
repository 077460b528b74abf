"""Read results from segments that are still written: each once, soon after it is finished.

- What a process has written may not be synced yet. A power cut may take it back; the row is then generated again.
- Memory stays flat: a few megabytes of a segment at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dpgen.journal import format as fmt
from dpgen.journal.reader import list_segments, make_read_error
from dpgen.records import RowResult
from dpgen.result_codec import decode_result

_CHUNK_BYTES = 4 << 20


class JournalTail:
    """Follow the segments of a journal directory.

    Args:
        after_attempt: follow the attempts after this one alone.
    """

    def __init__(self, journal_dir: Path, after_attempt: int) -> None:
        self._journal_dir, self._after_attempt = journal_dir, after_attempt
        self._ends: dict[Path, int] = {}  # how far each segment has been read

    def read_new(self) -> Iterator[list[RowResult]]:
        """Yield the results that were written since the last call, in batches; a row may have several.

        Raises:
            DpgenError: a segment can't be read.
        """
        for path in list_segments(self._journal_dir):
            key = fmt.parse_name(path.name)
            if key is not None and key[0] > self._after_attempt:
                yield from self._read_segment(path)

    def _read_segment(self, path: Path) -> Iterator[list[RowResult]]:
        try:
            with path.open("rb") as file:
                header = file.read(fmt.HEADER_BYTES)
                start, num_bytes = self._ends.get(path, fmt.HEADER_BYTES), _CHUNK_BYTES
                while True:
                    file.seek(start)
                    data = file.read(num_bytes)
                    frames, end = fmt.scan_frames(header + data)
                    if not len(frames):
                        if len(data) < num_bytes:
                            return
                        num_bytes *= 2  # a result that is larger
                        continue
                    results, start = frames.results, start + end - len(header)
                    self._ends[path] = start
                    places = zip(results.offset.tolist(), results.length.tolist(), strict=True)
                    shift = len(header)
                    yield [decode_result(data[at - shift : at - shift + length]) for at, length in places]
        except FileNotFoundError:  # it had no rows, and its writer has removed it
            return
        except OSError as error:
            raise make_read_error(path, error) from None
