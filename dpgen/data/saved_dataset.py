"""Write and read the forms that belong to Hugging Face `datasets`: its dataset cards, its folders, its objects."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dpgen.data.input_rows import InputRows
from dpgen.data.input_source import DESCRIPTION_FILE, InputSource
from dpgen.data.reading.cache import compute_files_key
from dpgen.data.reading.conversion import MIXED_NUMBERS, InputDescription
from dpgen.data.reading.invalid_text import escape, set_aside_invalid
from dpgen.data.reading.json_types import TypeInference, build_array, build_typed_array, is_json
from dpgen.data.reading.source import iter_line_batches, open_file
from dpgen.errors import ConfigError, DpgenError
from dpgen.formatting import format_count
from dpgen.imports import imports_without_gc
from dpgen.lifecycle.new_folder import fill_new_folder

if TYPE_CHECKING:
    import datasets

_TABLE_ROWS = 1_000
_NEXT_LINE = "\x85"
_ACCEPTED = "a datasets.Dataset, a list of dicts, a dict of columns, a pandas or Polars frame, or a path"


def write_card(directory: Path, schema: pa.Schema) -> None:
    """Write the dataset card, which names the columns' types; JSON lines don't hold them."""
    import datasets
    import yaml
    from huggingface_hub import DatasetCardData

    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))
    card = datasets.info.DatasetInfosDict({"default": info})
    card.write_to_directory(str(directory))
    if _NEXT_LINE in str(schema):  # `datasets` writes it as it is, and YAML reads it as a line's end
        data = DatasetCardData()
        card.to_dataset_card_data(data)
        content = yaml.safe_dump(data.to_dict(), sort_keys=False)  # type: ignore[no-untyped-call]
        (directory / "README.md").write_text(f"---\n{content}---\n")


def read_card(directory: Path) -> pa.Schema:
    """Return the columns' types that a dataset card names, with the features of `datasets`.

    Raises:
        DpgenError: there is no such card.
    """
    import datasets

    try:
        features = datasets.info.DatasetInfosDict.from_directory(str(directory))["default"].features
    except Exception as error:  # noqa: BLE001 - `datasets` passes on all that YAML and its classes raise
        raise _make_read_error(directory, error) from None
    if features is None:
        raise DpgenError(f"{directory} can't be read: its dataset card, README.md, names no types")
    return features.arrow_schema


def iter_typed_tables(files: Iterable[Path], schema: pa.Schema, encoding: int) -> Iterator[pa.Table]:
    """Yield the rows of JSON lines that dpgen wrote as tables of a schema, as `read_card` returns it; 1,000 at a time.

    `datasets.load_dataset` would take texts that look like dates for dates, and cut decimals off.

    Raises:
        DpgenError: a line is no row of the schema; names the file and the lines.
    """
    for file in files:
        first_line = 1
        with open_file(str(file)) as stream:
            for batch in iter_line_batches(stream):
                lines = batch.splitlines()
                for start in range(0, len(lines), _TABLE_ROWS):
                    part = lines[start : start + _TABLE_ROWS]
                    try:
                        yield _parse_lines(part, schema, encoding)
                    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
                        places = f"{file}, lines {first_line + start:,} to {first_line + start + len(part) - 1:,}"
                        raise _make_read_error(places, error) from None
                first_line += len(lines)


def _parse_lines(lines: Sequence[bytes], schema: pa.Schema, encoding: int) -> pa.Table:
    rows, names = list(map(json.loads, lines)), set(schema.names)
    if any(not isinstance(row, dict) or row.keys() != names for row in rows):
        raise ValueError("not all are objects with the columns that the dataset card names")
    arrays = [build_typed_array([row[field.name] for row in rows], field.type, encoding) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _make_read_error(place: object, error: Exception) -> DpgenError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DpgenError(f"{place} can't be read: {reason}. 'dpgen verify' checks the whole run")


def rename_columns(schema: pa.Schema, names: Mapping[str, str]) -> pa.Schema:
    """Return the schema of some columns under new names, with the features of `datasets` that it holds.

    Args:
        names: a column of the schema → its new name, in the new order.
    """
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    return datasets.Features({new: features[old] for old, new in names.items()}).arrow_schema


def save_to_disk(arrow_file: Path, directory: Path, max_shard_bytes: int) -> None:
    """Write what `save_to_disk` of `datasets` writes, a batch of rows at a time.

    Args:
        arrow_file: the rows, as an Arrow stream.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_file(str(arrow_file)).save_to_disk(str(directory), max_shard_size=max_shard_bytes)


@contextmanager
def keep_quiet() -> Iterator[None]:
    """Let `datasets` show no progress bars and log nothing within the block; a program's own settings come back."""
    with imports_without_gc():
        import datasets

    had_bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def to_input_rows(rows: Any) -> InputRows:
    """Return rows that a program holds as the input of a run.

    Values that JSON has are read as those of JSON lines: objects keep their own keys, and a column may mix types.

    Args:
        rows: a Dataset, a list of dicts (whose keys may differ: a missing value is null), a dict of columns, or a frame
            of pandas or Polars.

    Raises:
        ConfigError: rows of another kind, or values that Arrow can't hold; names the column.
    """
    import datasets

    if isinstance(rows, datasets.Dataset):
        if rows.format["type"] == "custom":
            raise ConfigError("dataset has a transform, which can't be saved: apply it with map() first")
        return InputRows(rows.with_format(None))
    if isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ConfigError(f"dataset is a dict of splits: give one of them, e.g. dataset[{next(iter(rows), 'train')!r}]")
    kind, package = type(rows).__name__, type(rows).__module__.partition(".")[0]
    if package in ("pandas", "polars") and kind == "DataFrame":
        from_frame = datasets.Dataset.from_polars if package == "polars" else _from_pandas
        return InputRows(_translate_conversion(lambda: from_frame(rows)))
    if isinstance(rows, Mapping):
        for name, values in rows.items():
            if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
                raise ConfigError(
                    f"dataset[{name!r}] is a {type(values).__name__}: a dict holds columns, each a list; for one row "
                    "give a list of one dict"
                )
        lengths = {name: len(values) for name, values in rows.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"dataset: its columns have different lengths: {lengths}")
        return _from_columns({str(name): list(values) for name, values in rows.items()})
    if isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)):
        wrong = next((number for number, row in enumerate(rows) if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise ConfigError(f"dataset[{wrong}] is a {type(rows[wrong]).__name__}: must be a dict of columns")
        names = dict.fromkeys(name for row in rows for name in row)
        if rows and not names:
            raise ConfigError(f"dataset: its {format_count(len(rows), 'row')} have no column")
        return _from_columns({str(name): [row.get(name) for row in rows] for name in names})
    raise ConfigError(f"dataset is a {kind}: must be {_ACCEPTED}")


def _from_pandas(frame: Any) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_pandas(frame, preserve_index=False)


def _from_columns(columns: Mapping[str, list[Any]]) -> InputRows:
    import datasets

    if not columns:
        return InputRows(datasets.Dataset.from_dict({}))
    description = InputDescription()
    made, kinds = [], set()
    for name, values in columns.items():
        has_json = _translate_conversion(partial(_are_json, values), name)
        convert = partial(_convert_json, description=description) if has_json else _infer_column
        made.append(_translate_conversion(partial(convert, escape(name), values), name))
        kinds.add("json" if has_json else "dataset")
    source = InputSource("json" if kinds == {"json"} else "dataset", description=description)
    if not description.invalid:
        source = replace(source, load_before=partial(_infer_columns, columns))
    return InputRows(datasets.concatenate_datasets(made, axis=1), source)


def _infer_columns(columns: Mapping[str, list[Any]]) -> datasets.Dataset:
    """Return a program's rows as older versions read them.

    Raises:
        ConfigError: Arrow has no common type for values of a column.
    """
    import datasets

    made = [_translate_conversion(partial(_infer_column, name, values), name) for name, values in columns.items()]
    return datasets.concatenate_datasets(made, axis=1)


def _are_json(values: list[Any]) -> bool:
    return all(map(is_json, values))


def _convert_json(name: str, values: list[Any], description: InputDescription) -> datasets.Dataset:
    """Return a column of JSON values with the type that a reader of JSON lines would find."""
    import datasets

    set_aside_invalid(values, name, 0, description.invalid)
    inference = TypeInference()
    table = pa.table({name: build_array(values, inference.infer(values))})
    if inference.mixes_numbers:
        description.changed[name] = MIXED_NUMBERS
    return datasets.Dataset(table)


def _infer_column(name: str, values: list[Any]) -> datasets.Dataset:
    """Return a column with the type that Arrow finds for Python's values."""
    import datasets

    return datasets.Dataset.from_dict({name: values})


def _translate_conversion(convert: Callable[[], Any], column: str | None = None) -> Any:
    try:
        return convert()
    except Exception as error:  # noqa: BLE001 - Arrow, pandas and `datasets` pass on all that values raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "dataset" if column is None else f"dataset: the values of column {column!r}"
        raise ConfigError(f"{where} can't be held by Arrow: {reason}") from None


def read_as_saved(rows: InputRows, directory: Path) -> InputRows:
    """Return a program's rows with the types that a run directory's rows have, if an older version saved them there.

    Args:
        directory: RUN_DIR/input.
    """
    saved = [path for path in directory.glob("[!.]*") if path.is_dir()]
    is_older = bool(saved) and not any((path / DESCRIPTION_FILE).exists() for path in saved)
    if is_older and (load := rows.source.load_before) is not None:
        with suppress(ConfigError):  # the older version would not have saved these rows
            return InputRows(load())
    return rows


def compute_digest(rows: InputRows) -> str:
    """Return a name for the contents of rows: the hash of what identifies an input, and of what is saved beside it."""
    identity = json.dumps(rows.fingerprint(), sort_keys=True) + (rows.source.describe_rows() or "")
    return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def save_whole(rows: InputRows, directory: Path) -> bool:
    """Save rows as a folder that is there as a whole or not at all; return False if it was there before.

    Raises:
        ConfigError: the folder can't be written.
    """
    if directory.is_dir():
        return False
    try:
        with fill_new_folder(directory) as folder:
            rows.dataset.save_to_disk(str(folder))
            if (description := rows.source.describe_rows()) is not None:
                (folder / DESCRIPTION_FILE).write_text(description)
    except FileExistsError:  # with the same contents
        return False
    except OSError as error:
        raise ConfigError(f"the input can't be saved in {directory}: {error.strerror or error}") from None
    return True


def load_result_dataset(
    directory: Path, file_format: str, cache_dir: Path, *, in_memory: bool, encoding: int
) -> datasets.Dataset:
    """Return the rows of RUN_DIR/dataset as a Dataset.

    Args:
        file_format: parquet or jsonl.
        cache_dir: for the Arrow files that the Dataset maps into memory.
        in_memory: hold all rows in memory, so that the files may be removed.

    Raises:
        DpgenError: they can't be read.
    """
    import datasets

    files = sorted(directory.glob(f"*.{file_format}"))
    try:
        if len(files) == 1 and (empty := _load_if_empty(files[0])) is not None:
            return empty
        if file_format == "jsonl":
            return _load_json_lines(directory, files, None if in_memory else cache_dir, encoding)
        names = [glob.escape(str(file)) for file in files]  # `datasets` takes file names for patterns
        return datasets.Dataset.from_parquet(names, cache_dir=str(cache_dir), keep_in_memory=in_memory)
    except DpgenError:
        raise
    except Exception as error:  # noqa: BLE001 - `datasets` passes on all that its readers raise
        raise _make_read_error(directory, error) from None


def _load_json_lines(directory: Path, files: Sequence[Path], cache_dir: Path | None, encoding: int) -> datasets.Dataset:
    """Return the rows of JSON lines with the card's types, in memory or mapped from a file in a folder."""
    import datasets

    schema = read_card(directory)
    if cache_dir is None:
        return datasets.Dataset(pa.concat_tables([schema.empty_table(), *iter_typed_tables(files, schema, encoding)]))
    path = cache_dir / f"{compute_files_key(map(str, [*files, directory / 'README.md']))}-{encoding}.arrow"
    if not path.exists():
        cache_dir.mkdir(exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache_dir))
        try:
            with pa.ipc.new_stream(str(temporary / path.name), schema) as writer:
                for table in iter_typed_tables(files, schema, encoding):
                    writer.write_table(table)
            (temporary / path.name).rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return datasets.Dataset.from_file(str(path))


def _load_if_empty(file: Path) -> datasets.Dataset | None:
    """Return the Dataset of a file without a row, for which `datasets` raises; None for any other file."""
    import datasets
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        return datasets.Dataset(pq.read_table(file)) if pq.read_metadata(file).num_rows == 0 else None
    return None if file.stat().st_size else datasets.Dataset.from_dict({})  # JSON lines without a row have no columns
