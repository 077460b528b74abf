"""Export the rows of a run into files: open the source, select, write, publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dpgen.config.checks import find_scheme
from dpgen.data.saved_dataset import rename_columns
from dpgen.data.storage.store import show_address
from dpgen.errors import ConfigError, suggest_name
from dpgen.journal.run_dir import RunDir
from dpgen.output.columns import list_float_columns
from dpgen.output.export.card import write_export_card
from dpgen.output.export.formats import COMPRESSIONS, FOLDER_FILES, FORMATS, OTHER_SUFFIXES, SUFFIXES, open_writer
from dpgen.output.export.selection import Selection, select_rows
from dpgen.output.export.source import ExportSource, open_source
from dpgen.output.export.stats import ExportStats
from dpgen.output.export.target import check_target, open_target, resolve_target
from dpgen.output.result_columns.messages_column import MESSAGES

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ExportReport:
    """Report an export; `dpgen export --json` prints the fields under these names.

    Attributes:
        target: the file or folder.
        format: one of `FORMATS`.
        num_input_rows: rows of the input.
        num_done: those of them that have a result.
        num_exported: rows of the export; samples where each is a row of its own.
        num_left_out: rows with a result that are not in the export.
        num_errors: exported rows with an error.
        columns: names of the export's columns.
        num_files: files with rows.
        num_bytes: their size.
    """

    target: str
    format: str
    num_input_rows: int
    num_done: int
    num_exported: int
    num_left_out: int
    num_errors: int
    columns: list[str] = field(default_factory=list)
    num_files: int = 1
    num_bytes: int = 0


def find_format(target: str, format: str | None) -> str:
    """Return the format of an export: the one that is given, or else that of the target's suffix.

    Raises:
        ConfigError: there is no such format, the suffix is that of another one or of none, or the target is an address.
    """
    if find_scheme(target) is not None:
        raise ConfigError(
            f"TARGET={show_address(target)}: must be a path; a run uploads its own result to output.to, and "
            "--push-to-hub exports to the Hub"
        )
    name = Path(target).name.lower()
    is_compressed = Path(name).suffix in COMPRESSIONS
    suffix = Path(Path(name).stem if is_compressed else name).suffix
    named = SUFFIXES.get(suffix)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown{suggest_name(format, FORMATS, 'formats')}")
    format = format or named or "parquet"
    if named not in (None, "jsonl" if format == "messages" else format):
        raise ConfigError(f"TARGET={target}: {suffix} is the suffix of {named}, and --format is {format}")
    if (ending := Path(name).suffix) in OTHER_SUFFIXES and format in FOLDER_FILES:
        texts = [suffix for suffix, kind in SUFFIXES.items() if kind not in FOLDER_FILES]
        endings = f"{', '.join(SUFFIXES)} ({', '.join(texts)} also with {', '.join(COMPRESSIONS)})"
        raise ConfigError(f"TARGET={target}: no file {ending} is written, but {endings}; a folder's name has no suffix")
    if is_compressed and format in FOLDER_FILES:
        raise ConfigError(f"TARGET={target}: {format} is not compressed as a whole; leave {Path(name).suffix} out")
    return format


def is_folder_format(target: str, format: str) -> bool:
    """Return True if an export is a folder: Parquet files are one unless the target has their suffix."""
    return format in FOLDER_FILES and SUFFIXES.get(Path(target).suffix.lower()) != format


def export_run(
    run_dir: RunDir,
    target: str,
    format: str,
    selection: Selection,
    *,
    overwrite: bool = False,
    for_hub: bool = False,
) -> ExportReport:
    """Export a run's rows to a file or folder.

    Args:
        format: one of `FORMATS`; see `find_format`.
        overwrite: replace an export that is there.
        for_hub: write the dataset card, beside which pandas and Polars can't read the folder; the target is dpgen's
            own, in the run directory, and needs no check.

    Raises:
        ConfigError: there is no run, the target may not be written, or a column is not there or can't be held.
        DpgenError: a file can't be read or written.
    """
    path, is_folder = resolve_target(target), is_folder_format(target, format)
    if not for_hub:
        check_target(path, run_dir.path, overwrite=overwrite, folder_files=FOLDER_FILES[format] if is_folder else None)
    source = open_source(run_dir, with_messages=format == "messages")
    columns = _choose_columns(source, format, selection)
    with open_target(path, is_folder=is_folder) as place:
        stats = write_rows(source, place, format, columns, only_successful=selection.only_successful)
        if for_hub:
            schema = rename_columns(source.schema, columns)
            write_export_card(place, run_dir, source, stats, schema)
        files = _list_files(place, format)
        num_bytes = sum(file.stat().st_size for file in files)
    return ExportReport(
        str(path),
        format,
        source.num_rows,
        source.num_done,
        stats.num_rows,
        stats.num_left_out,
        stats.errors.total(),
        list(columns.values()),
        len(files),
        num_bytes,
    )


def write_rows(
    source: ExportSource, place: Path, format: str, columns: dict[str, str], *, only_successful: bool
) -> ExportStats:
    """Write the selected rows, and return what they hold.

    Args:
        columns: the source's name of each column → the export's.
    """
    stats = ExportStats()
    schema = rename_columns(source.schema, columns)
    float_columns = [columns[name] for name in list_float_columns(source.dataset_format) if name in columns]
    has_answer = MESSAGES if format == "messages" else None
    with open_writer(format, place, schema, float_columns) as writer:
        for table in source.iter_tables():
            selected = select_rows(
                table, only_successful=only_successful or format == "messages", has_answer=has_answer
            )
            stats.num_left_out += table.num_rows - selected.num_rows
            stats.add(selected)
            if selected.num_rows:
                writer.write(_rename(selected, columns, schema))
    return stats


def _choose_columns(source: ExportSource, format: str, selection: Selection) -> dict[str, str]:
    if format != "messages":
        return selection.resolve(source.schema.names)
    chosen = selection.resolve(source.schema.names, [MESSAGES])
    return chosen if MESSAGES in chosen else {MESSAGES: MESSAGES, **chosen}


def _rename(table: pa.Table, columns: dict[str, str], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    arrays = [table.column(name) for name in columns]
    return pa.Table.from_arrays(
        [
            array if array.type == field.type else array.cast(field.type)
            for array, field in zip(arrays, schema, strict=True)
        ],
        schema=schema,
    )


def _list_files(place: Path, format: str) -> Sequence[Path]:
    """Return the files of an export that hold rows."""
    if not place.is_dir():
        return [place]
    suffix = {"parquet": ".parquet", "save_to_disk": ".arrow"}[format]
    return [path for path in place.iterdir() if path.suffix == suffix]
