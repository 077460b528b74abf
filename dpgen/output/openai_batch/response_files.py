"""Write the response files: one response for each line of the batch file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.config.prompt import REQUEST_COLUMN
from dpgen.data.input_rows import InputRows
from dpgen.data.token_texts import TokenTexts
from dpgen.data.tokenizer import TokenizerConfig, find_reason_to_tokenize_in_engine, load_tokenizer
from dpgen.output.file_set import FileSet
from dpgen.output.openai_batch.responses import ResponseBuilder, RunFacts, format_response_line
from dpgen.output.result_stats import ResultStats
from dpgen.records import RowResult

logger = logging.getLogger(__name__)

OPENAI_BATCH = "openai_batch"  # the value of output.format
FILE_SUFFIX = "jsonl"


def write_response_files(
    directory: Path,
    rows: InputRows,
    read_results: Callable[[np.ndarray], Iterator[list[RowResult]]],
    metadata: Mapping[str, Any],
    rows_per_file: int,
) -> ResultStats:
    """Write one response for each line of the batch file, in its order.

    Args:
        read_results: returns the results of rows, given as int64[num_rows], in batches and in this order.
        metadata: the content of run.json.
    """
    stats = ResultStats()
    builder = ResponseBuilder(RunFacts.from_metadata(metadata), lambda: load_token_texts(metadata))
    row_ids = np.arange(len(rows))
    texts = rows.iter_rows(row_ids, [REQUEST_COLUMN])
    with FileSet(directory, FILE_SUFFIX, lambda path: path.open("w", encoding="utf-8"), rows_per_file) as files:
        for results in read_results(row_ids):
            for file, start, count in files.allot(len(results)):
                for result in results[start : start + count]:
                    stats.add(result)
                    file.write(format_response_line(builder.build(next(texts)[REQUEST_COLUMN], result)))
    return stats


def load_token_texts(metadata: Mapping[str, Any]) -> TokenTexts:
    """Return what gives a run's tokens their text: by their ids, where only vLLM knows the tokenizer.

    Args:
        metadata: the content of run.json.
    """
    identity = metadata.get("identity") or {}
    engine = identity.get("engine") or {}
    if engine.get("kind") == "fake":
        return TokenTexts()
    config = TokenizerConfig.from_engine(str(Path(str(identity.get("model"))).expanduser()), engine)
    reason = find_reason_to_tokenize_in_engine(config)
    if reason is None:
        return TokenTexts(load_tokenizer(config))
    logger.info(f"tokens beside log-probabilities are written as token_id:N, since {reason}")
    return TokenTexts()
