"""Describe where the input rows come from, and what the readers made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpgen.data.reading.cache import compute_files_key
from dpgen.data.reading.conversion import InputDescription
from dpgen.data.reading.files import list_names
from dpgen.formatting import format_count

DESCRIPTION_FILE = "dpgen_description.json"  # beside the rows of a program, in a folder of `save_to_disk`


@dataclass(frozen=True)
class InputSource:
    """Describe where rows come from.

    Attributes:
        kind: of the files, and "json" for a program's values that JSON has; "dataset" where `datasets` read them.
        num_files: 0 for the Hub, and for a program's values.
        key: hash of what the disk says about the files; None where the contents have to be hashed at each start.
        description: what the readers found; None where `datasets` read.
        base: int64[num_rows], or a range: each row's number in the files, before `data.select` and `data.limit`.
        other_files: names of files beside the data that are not read.
        mapped_files: files that are read where they are while the run goes on; empty where a copy in the cache is.
        load_before: loads the same rows as older versions did, for the fingerprint in their run directories; None if
            these versions read them alike.
    """

    kind: str = "dataset"
    num_files: int = 0
    key: str | None = None
    description: InputDescription | None = None
    base: Any = None
    other_files: tuple[str, ...] = ()
    mapped_files: tuple[str, ...] = ()
    load_before: Callable[[], Any] | None = None

    def describe_rows(self) -> str | None:
        """Return the content of `DESCRIPTION_FILE`; None where saved rows need none."""
        if self.description is None:
            return None
        return json.dumps({"kind": self.kind, "description": self.description.to_json()})

    @classmethod
    def of_saved_dataset(cls, folder: str, files: Sequence[str]) -> InputSource:
        """Return the source of a folder that `save_to_disk` has filled, perhaps with a program's rows.

        Args:
            files: all that it holds.
        """
        key, names, file = compute_files_key(files), tuple(files), Path(folder) / DESCRIPTION_FILE
        if not file.exists():
            return cls(num_files=len(files), key=key, mapped_files=names)
        content = json.loads(file.read_bytes())
        description = InputDescription.from_json(content["description"])
        return cls(content["kind"], key=key, mapped_files=names, description=description)

    def has_changed(self) -> bool:
        """Return True if rows that are read now may not be those that the run began with."""
        if not self.mapped_files:
            return False
        try:
            return not str(self.key).startswith(compute_files_key(self.mapped_files))
        except OSError:
            return True

    def describe(self, num_rows: int, columns: Sequence[str], used_columns: Iterable[str]) -> str:
        """Return one line for the log: files, rows, columns used, and columns whose values or types are others."""
        files = f"{format_count(self.num_files, f'{self.kind} file')}, " if self.num_files else ""
        used = [name for name in columns if name in set(used_columns)]
        text = f"read {files}{format_count(num_rows, 'row')}, {format_count(len(columns), 'column')}"
        text += f" (used: {list_names(used)})" if used else ""
        if self.other_files:
            text += f"; not read: {list_names(list(self.other_files))}"
        if self.description is not None:
            notes = [f"column {name}: {change}" for name, change in self.description.changed.items()]
            notes += [f"column {name} is left out: {reason}" for name, reason in self.description.unreadable.items()]
            notes += self.description.notes
            if num_invalid := len(self.description.invalid):
                notes.append(f"{format_count(num_invalid, 'row')} with text that is not valid Unicode")
            text += "".join(f"; {note}" for note in notes)
        return text
