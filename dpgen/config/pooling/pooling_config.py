"""Hold the keys of the tasks embed, classify, score and reward, and check them against the other keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpgen.config.prompt import PromptConfig
    from dpgen.config.sections import DataConfig, OutputConfig

GENERATE = "generate"
TASKS = (GENERATE, "embed", "classify", "score", "reward")
_PAIR_TASKS = ("score", "classify")
# Keys of `output` that are about generated texts.
_TEXT_KEYS = (*("token_ids", "explode", "messages", "reasoning", "reasoning_parser", "tool_parser", "parse", "schema"),)
# Keys of `output` that are about a task's results, each with the task.
_TASK_KEYS = {"embedding_dtype": "embed", "dimensions": "embed", "normalize": "embed", "reward_per": "reward"}


@dataclass(frozen=True)
class PoolingConfig:
    """Hold what decides a pooling task's results, besides the model and the prompts.

    Attributes:
        task: "embed", "classify", "score" or "reward".
        too_long: `data.too_long`.
        embedding_dtype, dimensions, normalize, reward_per: as in `output`.
    """

    task: str
    too_long: str = "error"
    embedding_dtype: str = "float32"
    dimensions: int | None = None
    normalize: bool | None = None
    reward_per: str = "row"


def find_wrong_task_keys(
    task: str, sections: Mapping[str, Any], default_data: DataConfig, default_output: OutputConfig
) -> Iterator[str]:
    """Yield one line for each key that does not go with the task.

    Args:
        sections: the fields of a `Config`, by name.
        default_data, default_output: the sections as they are where nothing is set.
    """
    data, output = sections["data"], sections["output"]
    for name, of_task in _TASK_KEYS.items():
        value = getattr(output, name)
        # Scores may be cosines of embeddings.
        takes_dimensions = task == "score" and name == "dimensions"
        if value != getattr(default_output, name) and task != of_task and not takes_dimensions:
            yield f"output.{name}={value} has no effect: it belongs to task={of_task}, and task={task}"
    if task == GENERATE:
        if data.too_long != default_data.too_long:
            yield f"data.too_long={data.too_long} needs task=embed, classify, score or reward: task=generate rejects"
        for name in _find_pair_keys(data):
            yield f"data.{name} needs task=score or classify: task=generate has one prompt"
        return
    if data.too_long == "chunk_mean" and task != "embed":
        yield f"data.too_long=chunk_mean averages embeddings: task={task} has none; set error or truncate"
    keys = ["sampling"] if sections["sampling"] else []
    keys += ["sampling_by_rank"] if sections["sampling_by_rank"] else []
    keys += [f"output.{name}" for name in _TEXT_KEYS if getattr(output, name) != getattr(default_output, name)]
    keys += ["check"] if sections["check"].is_used else []
    keys += ["data.completion_column"] if data.completion_column is not None else []
    keys += ["data.prefill_column"] if data.prefill_column is not None else []
    for key in keys:
        yield f"{key} has no effect: task={task} generates no text; leave one of them out"


def has_misplaced_pair(task: str, data: DataConfig) -> bool:
    """Return True if columns of a pair are named, and the task generates text."""
    return task == GENERATE and bool(_find_pair_keys(data))


def find_wrong_task_input(task: str, prompt: PromptConfig, *, is_batch: bool) -> Iterator[str]:
    """Yield one line for each mistake in where a task's texts come from.

    Args:
        is_batch: True if the input is a batch file.
    """
    if task == "score" and not prompt.is_pair:
        yield "task=score compares texts: set data.query_column and data.document_column"
    if prompt.is_pair and task not in (*_PAIR_TASKS, GENERATE):
        yield f"data.query_column and data.document_column need task=score or classify: task={task} reads one text"
    if prompt.documents_column is not None and task != "score":
        yield f"data.documents_column needs task=score: task={task} reads one pair a row; set data.document_column"
    if is_batch and task not in (GENERATE, "embed"):
        yield f"task={task} can't answer a batch file: set task=embed for /v1/embeddings, or task=generate"


def _find_pair_keys(data: DataConfig) -> list[str]:
    names = ("query_column", "document_column", "documents_column")
    return [name for name in names if getattr(data, name) is not None]
