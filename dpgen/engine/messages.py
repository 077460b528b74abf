"""What the rank process and its engine process say to each other over their pipe, as pickled objects.

Down go `Load`, `SetKvBytes`, lists of `Request`, and `Stop`. Up come `OptionsChecked`, then `KvBytesMeasured`, then `Ready`, then
`Finished` and `Stats` for as long as there is work; `Failed` ends it. Only finished rows come up: nothing is sent
per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpgen.distributed.layout import EngineWorld
from dpgen.records import Request, RowResult


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made from.

    Attributes:
        kind: "vllm" or "fake".
        model: a folder or Hub name.
        options: fields of vLLM's EngineArgs.
        sampling: fields of SamplingParams, the same for every row.
        sampling_columns: fields of SamplingParams that rows give themselves.
        sampling_by_rank: for checking; a request brings the fields of its row's entry along.
        tensor_parallel_size, pipeline_parallel_size: devices of this one engine.
        local_size: engines on this node, which share its memory where they run on the CPU.
        enable_expert_parallel: whether a mixture of experts is split over the devices.
        world: the processes that this one makes an engine with; None where it is alone.
        token_ids: whether results carry the generated token ids.
    """

    kind: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    sampling_columns: tuple[str, ...] = ()
    sampling_by_rank: tuple[dict[str, Any], ...] = ()
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    local_size: int = 1
    enable_expert_parallel: bool = False
    world: EngineWorld | None = None
    token_ids: bool = False

    def sampling_names(self) -> Iterator[tuple[str, str]]:
        """Every field of SamplingParams that the configuration names, as (section, field)."""
        yield from (("sampling", name) for name in (*self.sampling, *self.sampling_columns))
        for index, entry in enumerate(self.sampling_by_rank):
            yield from ((f"sampling_by_rank[{index}]", name) for name in entry)


@dataclass(frozen=True)
class EngineTextConfig:
    """What the engine process does of the work on text; the rank process does the rest, while the engine steps.

    Attributes:
        prompt_settings: how to render prompts, for tokenizers that only vLLM knows; None where the rank renders.
        leaves_text: whether the rank makes the text of finished rows, where the engine need not.
    """

    prompt_settings: Any = None
    skip_detokenize: bool = False


@dataclass(frozen=True)
class LoadModel:
    """Down: load the model now.

    Attributes:
        text: which work on text comes with it.
        kv_bytes: imposes a KV cache size (bytes a device) that was agreed before.
    """

    text_config: EngineTextConfig = field(default_factory=EngineTextConfig)
    kv_bytes: int | None = None


@dataclass(frozen=True)
class SetKvBytes:
    """Down: allocate so many bytes of KV cache a device."""

    num_bytes: int


@dataclass(frozen=True)
class Shutdown:
    """Down: drop what is in flight and end."""


@dataclass(frozen=True)
class OptionsChecked:
    """Up: the options are legal (`problem` is None) or not, before anything is loaded; `notes` are for the log."""

    problem: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class KvBytesMeasured:
    """Up: bytes of memory a device that this engine has free for its KV cache; a `SetKvBytes` must follow."""

    num_bytes: int


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine is like.

    Attributes:
        max_num_seqs: sequences that it runs at a time.
        max_model_len: tokens of prompt and completion together.
        num_kv_blocks, kv_block_tokens: size of its KV cache.
        versions: package → version.
        device: "cpu", "cuda", ...
    """

    max_num_seqs: int
    max_model_len: int
    num_kv_blocks: int
    kv_block_tokens: int
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""


@dataclass(frozen=True)
class EngineReady:
    """Up: the model is loaded; requests may come."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class UndecodedRow:
    """A row that is through but for its text, which its rank makes.

    Attributes:
        result: its completions' texts are "".
        token_ids: of each completion, those that its text is made of.
        skip_special_tokens: whether special tokens are left out of the text.
        prompt_token_ids: the row's prompt; the rank has it, so that it need not come back.
    """

    result: RowResult
    token_ids: tuple[list[int], ...]
    skip_special_tokens: bool
    prompt_token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class RowsFinished:
    """Up: rows that are through, with completions or an error."""

    results: list[RowResult]
    undecoded: list[UndecodedRow] = field(default_factory=list)

    @property
    def rows(self) -> Iterator[int]:
        """The rows, whether decoded or not."""
        yield from (result.row for result in self.results)
        yield from (each.result.row for each in self.undecoded)


@dataclass(frozen=True)
class EngineStats:
    """Up, about once a second while there is work: a sign of life with numbers since the start.

    Attributes:
        num_generated_tokens: of all rows, those still running included.
        num_running, num_waiting: sequences now.
        num_preemptions: sequences that were set back for want of KV blocks.
        num_cached_tokens: of finished rows' prompts, those that were in the prefix cache.
    """

    num_generated_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    def add_counts(self, earlier: EngineStats) -> EngineStats:
        """These numbers, with the counts of an earlier engine's life added."""
        return EngineStats(
            earlier.num_generated_tokens + self.num_generated_tokens,
            self.num_running,
            self.num_waiting,
            earlier.num_preemptions + self.num_preemptions,
            earlier.num_cached_tokens + self.num_cached_tokens,
        )


@dataclass(frozen=True)
class EngineFailed:
    """Up, last: the engine can't go on."""

    message: str


Event = OptionsChecked | KvBytesMeasured | EngineReady | RowsFinished | EngineStats | EngineFailed


class AgreeKvFn(Protocol):
    """Asks the rank process for the KV cache size: measured bytes in, agreed bytes out."""

    def __call__(self, measured_bytes: int) -> int: ...


class Backend(Protocol):
    """An engine inside the engine process."""

    def check_options(self) -> tuple[str, ...]:
        """Checks the options without loading; gives notes for the log.

        Raises:
            ConfigError: an illegal option, with its nearest legal neighbour.
        """

    def load(self, agree_kv: AgreeKvFn, text_config: EngineTextConfig) -> EngineInfo:
        """Loads the model and makes the engine ready; see `Load`."""

    def add_request(self, request: Request) -> None:
        """Takes a row in.

        Raises:
            RowRefused: this row can't be generated.
        """

    def step(self) -> list[RowResult | UndecodedRow]:
        """Runs the model once; gives the rows that this finished."""

    def has_unfinished_requests(self) -> bool:
        """Whether a step would do anything."""

    def stats(self) -> EngineStats:
        """The numbers so far."""

    def close(self) -> None:
        """Ends in good order: worker processes, shared memory."""
