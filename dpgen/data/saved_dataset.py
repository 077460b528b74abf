"""Write and read the forms that belong to Hugging Face `datasets`: its dataset cards and its folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpgen.data.input_rows import InputRows
from dpgen.errors import DpgenError

if TYPE_CHECKING:
    import pyarrow as pa


def write_card(directory: Path, schema: pa.Schema) -> None:
    """Write the dataset card, from which `datasets` reads the columns' types; JSON lines don't hold them."""
    import datasets

    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))
    card = datasets.info.DatasetInfosDict({"default": info})
    card.write_to_directory(str(directory))


def load_with_card(directory: Path) -> InputRows:
    """Return the rows of JSON lines with the types that the dataset card beside them names.

    Raises:
        DpgenError: they can't be read.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return InputRows(datasets.load_dataset(str(directory), split="train"))
    except Exception as error:  # noqa: BLE001 - `datasets` passes on all that its readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DpgenError(f"{directory} can't be read: {reason}") from None


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
