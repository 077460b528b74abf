"""Write the files of a final dataset from an Arrow table, without a job, and read them back as users do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpgen.config.program import ProgramConfig
from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, OutputConfig, RunConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.journal.run_dir import RunDir
from dpgen.journal.run_identity import compute_run_identity
from dpgen.journal.writer import JournalWriter
from dpgen.output.columns import DatasetFormat
from dpgen.output.dataset_writer import write_dataset, write_dataset_files
from dpgen.records import Completion, RowResult

RESULT_COLUMNS = {"row_id", "generated_text", "finish_reason", "num_prompt_tokens", "num_generated_tokens", "error"}


def make_rows(table: pa.Table) -> InputRows:
    """Return a table as the input of a run."""
    return InputRows(datasets.Dataset(table))


def write_files(directory: Path, rows: InputRows, file_format: Any, kept_columns: list[str] | None = None) -> Path:
    """Write a dataset of one file whose results are all the same, and return that file."""
    directory.mkdir(parents=True, exist_ok=True)

    def read_results(row_ids: np.ndarray) -> Iterator[list[RowResult]]:
        for row_id in row_ids.tolist():  # in batches of one, as if rows were large
            yield [RowResult(row_id, 1, (Completion("text", "stop", 1),))]

    dataset_format = DatasetFormat(file_format=file_format, kept_columns=kept_columns)
    write_dataset_files(directory, rows, read_results, dataset_format, OutputConfig().rows_per_file)
    [file] = directory.glob("train-*")
    return file


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the input's columns in JSON lines, which must be strict JSON."""

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = path.read_text(encoding="utf-8").split("\n")
    return [drop_results(json.loads(line, parse_constant=reject)) for line in lines if line]


def drop_results(row: dict[str, Any]) -> dict[str, Any]:
    """Return the input's columns of a row of a result."""
    return {name: value for name, value in row.items() if name not in RESULT_COLUMNS}


def drop_all_results(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the input's columns of rows of a result."""
    return [drop_results(row) for row in rows]


def make_run(
    folder: Path,
    table: pa.Table | DataConfig,
    results: Sequence[RowResult],
    file_format: Any = "parquet",
    **sections: Any,
) -> RunDir:
    """Make a finished run in FOLDER/run, with its input in FOLDER/rows.parquet, without a job.

    Args:
        table: the input, or the configuration of one that is there already.
        sections: `task` with `pooled`, `program`, `sampling`, keys of `data`, and the keys of `output`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(table, DataConfig):
        data = table
    else:
        prompt = {} if "program" in sections else {"prompt_column": table.column_names[0]}
        data = DataConfig(path=str(folder / "rows.parquet"), **{**prompt, **sections.pop("data", {})})
        pq.write_table(table, folder / "rows.parquet")
    engine = {"pooled": dataclasses.asdict(pooled)} if (pooled := sections.pop("pooled", None)) else {}
    config = Config(
        run=RunConfig(dir=str(folder / "run"), engine="fake"),
        model="none",
        data=data,
        task=sections.pop("task", "generate"),
        program=sections.pop("program", ProgramConfig()),
        sampling=sections.pop("sampling", {}),
        output=OutputConfig(format=file_format, rows_per_file=4, **sections),
    )
    rows = load_input(config.data)
    run_dir = RunDir(config.run.dir)
    run_dir.create()
    run_dir.write_config(config)
    run_dir.update_metadata(identity=compute_run_identity(config, rows.fingerprint()), engine=engine)
    journal = JournalWriter(run_dir.journal, 1, 0)
    for result in results:
        journal.append(result)
    journal.close()
    write_dataset(rows, run_dir, DatasetFormat.from_config(config, run_dir.read_metadata()), 4)
    return run_dir
