"""Describe the columns of the tasks embed, classify, score and reward, and build their values.

- Vectors are lists of a fixed size, where the loaded model has said how wide they are; in JSON lines they are lists of
  the shortest decimals that float32 reads back as the same numbers.
- The journal has all vectors as float32. Other types are made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpgen.output.column_values import INT64, LOGPROBS, TEXT, Entry, to_shortest_decimals
from dpgen.output.result_columns.result_column import ResultColumn

if TYPE_CHECKING:
    import pyarrow as pa

    from dpgen.output.columns import DatasetFormat


def convert_embedding(vector: np.ndarray, dtype: str) -> np.ndarray:
    """Return an embedding in a type of `output.embedding_dtype`.

    Args:
        vector: float32[width].

    Returns:
        float32[width], float16[width], int8[width], or for "binary" int8[width / 8], rounded up.
    """
    if dtype == "float16":
        return vector.astype(np.float16)
    if dtype == "int8":
        largest = float(np.abs(vector).max(initial=0.0))
        return np.rint(vector * (127 / largest if largest else 0.0)).astype(np.int8)
    if dtype == "binary":
        return (np.packbits(vector > 0).astype(np.int16) - 128).astype(np.int8)
    return vector


def _get_vectors(entry: Entry) -> np.ndarray | None:
    """Return a row's vectors, float32[num_vectors, width]; None for a row without a result."""
    pooled = entry.result.pooled
    return None if pooled is None or entry.result.error is not None else pooled.values


def _list_vectors(entries: Sequence[Entry]) -> list[np.ndarray | None]:
    return [_get_vectors(entry) for entry in entries]


def _build_embeddings(entries: Sequence[Entry], dataset_format: DatasetFormat) -> pa.Array:
    assert dataset_format.pooling is not None
    dtype = dataset_format.pooling.embedding_dtype
    if dataset_format.reads_requests:  # which may have several texts, and dimensions of their own
        type = _get_number_type(dataset_format, dtype)
        rows = [
            None if vectors is None else [_to_numbers(convert_embedding(v, dtype), dataset_format) for v in vectors]
            for vectors in _list_vectors(entries)
        ]
        import pyarrow as pa

        return pa.array(rows, pa.list_(pa.list_(type)))
    vectors = [None if found is None else convert_embedding(found[0], dtype) for found in _list_vectors(entries)]
    width = None if dataset_format.pooled is None else dataset_format.pooled.width
    if width is not None and dtype == "binary":
        width = -(-width // 8)
    return _build_lists(vectors, dataset_format, dtype, width)


def _build_probs(entries: Sequence[Entry], dataset_format: DatasetFormat) -> pa.Array:
    import pyarrow as pa

    vectors = [None if found is None else found[0] for found in _list_vectors(entries)]
    labels = () if dataset_format.pooled is None else dataset_format.pooled.labels
    if not labels:
        return _build_lists(vectors, dataset_format, "float32", None)
    type = pa.struct([(label, _get_number_type(dataset_format, "float32")) for label in labels])
    rows = [None if v is None else dict(zip(labels, _to_numbers(v, dataset_format), strict=True)) for v in vectors]
    return pa.array(rows, type)


def _build_labels(entries: Sequence[Entry], dataset_format: DatasetFormat) -> pa.Array:
    import pyarrow as pa

    labels = () if dataset_format.pooled is None else dataset_format.pooled.labels
    best = [None if found is None else int(found[0].argmax()) for found in _list_vectors(entries)]
    names = [None if index is None else labels[index] if labels else f"LABEL_{index}" for index in best]
    return pa.array(names, pa.string())


def _build_scores(entries: Sequence[Entry], dataset_format: DatasetFormat) -> pa.Array:
    vectors = [None if found is None else found[:, 0] for found in _list_vectors(entries)]
    if dataset_format.has_score_lists:
        return _build_lists(vectors, dataset_format, "float32", None)
    return _build_numbers(vectors, dataset_format)


def _build_rewards(entries: Sequence[Entry], dataset_format: DatasetFormat) -> pa.Array:
    assert dataset_format.pooling is not None
    width = 1 if dataset_format.pooled is None else dataset_format.pooled.width
    vectors = _list_vectors(entries)
    if dataset_format.pooling.reward_per == "row":
        firsts = [None if found is None else found[0] for found in vectors]
        return _build_numbers(firsts, dataset_format) if width == 1 else _build_lists(firsts, dataset_format)
    if width == 1:
        return _build_lists([None if found is None else found[:, 0] for found in vectors], dataset_format)
    import pyarrow as pa

    type = pa.list_(pa.list_(_get_number_type(dataset_format, "float32")))
    rows = [None if found is None else [_to_numbers(v, dataset_format) for v in found] for found in vectors]
    return pa.array(rows, type)


def _build_numbers(vectors: Sequence[np.ndarray | None], dataset_format: DatasetFormat) -> pa.Array:
    """Return the first value of each vector."""
    import pyarrow as pa

    values = [None if vector is None else _to_numbers(vector[:1], dataset_format)[0] for vector in vectors]
    return pa.array(values, _get_number_type(dataset_format, "float32"))


def _build_lists(
    vectors: Sequence[np.ndarray | None],
    dataset_format: DatasetFormat,
    dtype: str = "float32",
    width: int | None = None,
) -> pa.Array:
    """Return vectors as lists, of a fixed size where all have the same.

    Args:
        width: numbers in each vector; None where they differ, or are not known.
    """
    import pyarrow as pa

    type = _get_number_type(dataset_format, dtype)
    if width is None or dataset_format.file_format == "jsonl":
        rows = [None if vector is None else _to_numbers(vector, dataset_format) for vector in vectors]
        return pa.array(rows, pa.list_(type))
    filler = np.zeros(width, type.to_pandas_dtype())
    flat = np.concatenate([filler if v is None else v for v in vectors]) if vectors else np.zeros(0, filler.dtype)
    mask = pa.array([vector is None for vector in vectors], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, type), width, mask=mask)


def _get_number_type(dataset_format: DatasetFormat, dtype: str) -> pa.DataType:
    import pyarrow as pa

    if dtype in ("int8", "binary"):
        return pa.int8()
    if dataset_format.file_format == "jsonl":
        return pa.float64()
    return pa.float16() if dtype == "float16" else pa.float32()


def _to_numbers(vector: np.ndarray, dataset_format: DatasetFormat) -> Any:
    """Return a vector as its column takes it: in JSON lines as the shortest decimals."""
    if dataset_format.file_format == "jsonl" and vector.dtype.kind == "f":
        return to_shortest_decimals(vector)
    return vector


def _is_of(*tasks: str) -> Any:
    """Return whether a dataset's format is that of one of some tasks, as a function of the format."""
    return lambda dataset_format: dataset_format.pooling is not None and dataset_format.pooling.task in tasks


def _is_cut_by(too_long: str) -> Any:
    return lambda dataset_format: dataset_format.pooling is not None and dataset_format.pooling.too_long == too_long


POOLED_COLUMNS = (
    ResultColumn("embedding", LOGPROBS, _get_vectors, False, _is_of("embed"), build=_build_embeddings),
    ResultColumn("probs", LOGPROBS, _get_vectors, False, _is_of("classify"), build=_build_probs),
    ResultColumn("label", TEXT, _get_vectors, False, _is_of("classify"), build=_build_labels),
    ResultColumn("score", LOGPROBS, _get_vectors, False, _is_of("score"), build=_build_scores),
    ResultColumn("reward", LOGPROBS, _get_vectors, False, _is_of("reward"), build=_build_rewards),
    ResultColumn(
        "num_cut_tokens",
        INT64,
        lambda entry: None if entry.result.pooled is None else entry.result.pooled.num_cut_tokens,
        False,
        _is_cut_by("truncate"),
    ),
    ResultColumn(
        "num_chunks",
        INT64,
        lambda entry: None if entry.result.pooled is None else entry.result.pooled.num_chunks,
        False,
        _is_cut_by("chunk_mean"),
    ),
)
