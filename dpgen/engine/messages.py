"""Messages between a rank process and its engine process, pickled over one pipe.

- Rank to engine: `LoadModel`, `SetKvBytes`, `SetTextConfig`, lists of `Request`, and `Shutdown`.
- Engine to rank: `OptionsChecked`, `KvBytesMeasured` and `EngineReady`, in this order, then `RowsFinished` and
  `EngineStats` while there is work. `EngineFailed` is always the last message.
- `LoadModel` may be sent before `OptionsChecked` has come: an engine whose options are wrong doesn't load.
- After `BeginJob` the same messages follow again. The model stays loaded, and so does its KV cache.
- Only finished rows are sent to the rank: nothing is sent per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dpgen.config.pooling.pooling_config import PoolingConfig
from dpgen.config.prompt import PromptConfig
from dpgen.data.openai_batch.lines import CHAT_URL
from dpgen.data.openai_batch.requests import lay_retry_over, select_plain_sampling
from dpgen.distributed.layout import EngineWorld
from dpgen.records import PooledKind, Request, RequestId, RowResult, UndecodedRow


@dataclass(frozen=True)
class EngineSpec:
    """Describe the engine that a process is to start.

    Attributes:
        kind: "vllm" or "fake".
        model: a folder or Hub name.
        options: fields of vLLM's EngineArgs.
        sampling: fields of SamplingParams, the same for every row.
        sampling_columns: fields of SamplingParams that each row takes from its columns.
        sampling_by_rank, retry_sampling: only checked here; a request carries those that hold for it.
        tensor_parallel_size, pipeline_parallel_size: devices of this one engine.
        local_size: ranks on this node, whose engines share its memory where they run on the CPU.
        num_sharing: ranks on this one's GPUs, itself included, which divide their memory (`parallel.share_devices`).
        num_engines: engines of this rank, which divide its part (`parallel.engines_per_rank`).
        is_num_engines_auto: fewer are enough, if the memory has no room for so many.
        is_measured: the first rows are to tell how many engines pay.
        memory_fraction: of a device's memory, that its engines divide unless `gpu_memory_utilization` is given; None
            for vLLM's default.
        engine_bytes: of a device's memory that each of several engines should have; 0 if not known.
        weight_bytes: of the weights on each device, at least; 0 if not known.
        enable_expert_parallel: split a mixture of experts over the devices.
        world: the processes that form one engine, or step together, with this one; None for an engine of its own.
        token_ids: return the generated token ids with each result.
        adapters: the folder of each LoRA adapter that rows may name.
        has_output_schema: True if `output.schema` has set the structured outputs in `sampling`.
        reads_requests: rows are requests of a batch file.
        reasoning_parser: as in `RequestParsers`.
        pooling: the task, if the model's hidden states are pooled; None to generate text.
        takes_media: the rows have images, audio or video.
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
    adapters: dict[str, str] = field(default_factory=dict)
    has_output_schema: bool = False
    reads_requests: bool = False
    retry_sampling: dict[str, Any] = field(default_factory=dict)
    num_sharing: int = 1
    num_engines: int = 1
    is_num_engines_auto: bool = False
    is_measured: bool = False
    memory_fraction: float | None = None
    engine_bytes: int = 0
    weight_bytes: int = 0
    reasoning_parser: str | None = None
    pooling: PoolingConfig | None = None
    takes_media: bool = False

    def iter_sampling_sections(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `sampling` and the sections over it, as (section, fields)."""
        yield "sampling", self.sampling
        yield "check.retry_sampling", self.retry_sampling
        yield from ((f"sampling_by_rank[{index}]", entry) for index, entry in enumerate(self.sampling_by_rank))

    @property
    def max_logprobs(self) -> int:
        """Return the largest number of log-probabilities for a token that a section of sampling asks for."""
        sections = (self.sampling, *self.sampling_by_rank)
        return max(section.get(name) or 0 for section in sections for name in ("logprobs", "prompt_logprobs"))

    def resolve_sampling(self, of_model: Mapping[str, Any], request: Request) -> dict[str, Any]:
        """Return a row's fields of SamplingParams: the model's own, the run's over them, and the row's over both.

        Of a request of a batch file, only some fields are known without vLLM's own classes of requests.

        Args:
            of_model: from the model's generation config.
        """
        fields = {"max_tokens": None, **of_model, **self.sampling, **request.sampling}
        if (source := request.server_request) is not None:
            plain = select_plain_sampling(source)
            if source.url != CHAT_URL and source.body.get("max_tokens") is None and fields["max_tokens"] is not None:
                del plain["max_tokens"]  # the server's default, which comes after all others
            fields |= lay_retry_over(request, plain, self.retry_sampling)
        if request.num_completion_tokens:  # vLLM has to generate one token; it is dropped
            fields |= {"max_tokens": 1, "temperature": 0}
        return fields

    def iter_sampling_names(self) -> Iterator[tuple[str, str]]:
        """Yield every field of SamplingParams that the configuration names, as (section, field)."""
        yield from (("sampling", name) for name in self.sampling_columns)
        for section, entry in self.iter_sampling_sections():
            yield from ((section, name) for name in entry)


@dataclass(frozen=True)
class RequestParsers:
    """Name vLLM's parsers of completions, which requests of a batch file are adjusted to.

    Attributes:
        tool_parser: vLLM's name; None for none.
        reasoning_parser: vLLM's name, "auto" for that of the model's type, or None for none.
        template_kwargs: `data.chat_template_kwargs`.
    """

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineTextConfig:
    """Divide the work on text: the engine process does this part, and the rank does the rest while the engine steps.

    Attributes:
        prompt_config: how to render prompts, for tokenizers that only vLLM knows, or to check those that are token ids;
            None where the rank does so.
        skip_detokenize: leave the text of finished rows to the rank, except where the engine itself needs it.
        parsers: those of the run's completions.
    """

    prompt_config: PromptConfig | None = None
    skip_detokenize: bool = False
    parsers: RequestParsers = field(default_factory=RequestParsers)


@dataclass(frozen=True)
class LoadModel:
    """Ask the engine to load the model now. Rank to engine.

    Attributes:
        kv_bytes: KV cache bytes per device, as agreed in an earlier life; None to measure and ask.
    """

    kv_bytes: int | None = None


@dataclass(frozen=True)
class SetKvBytes:
    """Ask the engine to allocate this many bytes of KV cache per device. Rank to engine."""

    num_bytes: int


@dataclass(frozen=True)
class SetTextConfig:
    """Tell the engine its part of the work on text, which it needs once it has loaded the model. Rank to engine."""

    text_config: EngineTextConfig


@dataclass(frozen=True)
class BeginJob:
    """Ask a loaded engine to drop the rows in flight, and to serve another job with the same model. Rank to engine.

    Attributes:
        spec: of the same model, options and devices; its sampling, and what it says of the rows, may differ.
    """

    spec: EngineSpec


@dataclass(frozen=True)
class Shutdown:
    """Ask the engine to drop the rows in flight and end. Rank to engine."""


@dataclass(frozen=True)
class OptionsChecked:
    """Report the check of the options, before anything is loaded. Engine to rank.

    Attributes:
        problem: the illegal option; None if all are legal.
        notes: lines for the log.
        num_engines, memory_fraction: as of `EngineSpec`, for all engines of the rank.
        max_num_seqs: sequences that the engine is to run at a time; 0 where it does not tell.
    """

    problem: str | None = None
    notes: tuple[str, ...] = ()
    num_engines: int = 1
    max_num_seqs: int = 0
    memory_fraction: float | None = None


@dataclass(frozen=True)
class KvBytesMeasured:
    """Report the bytes per device that are free for the KV cache; `SetKvBytes` must follow. Engine to rank."""

    num_bytes: int


@dataclass(frozen=True)
class EngineInfo:
    """Describe a loaded engine.

    Attributes:
        max_num_seqs: sequences that run at a time.
        max_model_len: tokens of prompt and completion together.
        num_kv_blocks, kv_block_tokens: size of the KV cache.
        versions: package → version.
        device: "cpu", "cuda", ...
        pooled: what the vectors of a pooling model are; None where text is generated.
    """

    max_num_seqs: int
    max_model_len: int
    num_kv_blocks: int
    kv_block_tokens: int
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    pooled: PooledKind | None = None


@dataclass(frozen=True)
class EngineReady:
    """Report that the model is loaded and requests may come. Engine to rank.

    Attributes:
        phases: what the engine itself did since its start, as (name, seconds), without its waits for the rank.
    """

    info: EngineInfo
    phases: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class RowsFinished:
    """Report finished rows, with completions or an error. Engine to rank."""

    results: list[RowResult]
    undecoded: list[UndecodedRow] = field(default_factory=list)

    @property
    def ids(self) -> Iterator[RequestId]:
        """Ids of the finished requests, decoded or not."""
        yield from (result.id for result in self.results)
        yield from (undecoded.id for undecoded in self.undecoded)


@dataclass(frozen=True)
class EngineStats:
    """Report counts since the engine's start; once a second while it has work. Engine to rank.

    Attributes:
        num_generated_tokens: of all rows, running ones included.
        num_running, num_waiting: sequences now.
        num_preemptions: sequences preempted because the KV cache was full.
        num_cached_tokens: prompt tokens of finished rows that were in the prefix cache.
        num_computed_tokens: tokens of all rows that are in the KV cache or were, prompts included; a preempted
            sequence's count again from 0.
        kv_cache_usage: fraction of the KV cache in use now; None where the engine does not say.
        num_steps, elapsed_s, processor_s: steps, seconds since the engine was ready, and seconds for which the thread
            that steps has computed.
        device_busy: share of the time since the last report in which the device ran kernels, of any process; None
            where nothing tells.
        is_sample: True for the calibration alone, between two of those that everybody gets.
    """

    num_generated_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    kv_cache_usage: float | None = None
    num_steps: int = 0
    elapsed_s: float = 0.0
    processor_s: float = 0.0
    device_busy: float | None = None
    is_sample: bool = False

    @property
    def progress(self) -> tuple[int, ...]:
        """Return the counts of which at least one grows in an engine that gets somewhere."""
        return self.num_generated_tokens, self.num_cached_tokens, self.num_computed_tokens

    def add_counts(self, earlier: EngineStats) -> EngineStats:
        """Return these numbers plus the counts of the engine's earlier lives."""
        return replace(
            self,
            num_generated_tokens=earlier.num_generated_tokens + self.num_generated_tokens,
            num_preemptions=earlier.num_preemptions + self.num_preemptions,
            num_cached_tokens=earlier.num_cached_tokens + self.num_cached_tokens,
            num_computed_tokens=earlier.num_computed_tokens + self.num_computed_tokens,
        )


@dataclass(frozen=True)
class EngineFailed:
    """Report that the engine cannot continue. Engine to rank, and its last message."""

    message: str


Event = OptionsChecked | KvBytesMeasured | EngineReady | RowsFinished | EngineStats | EngineFailed


class AgreeKvFn(Protocol):
    """Ask the rank process for the KV cache size: measured bytes in, agreed bytes out."""

    def __call__(self, measured_bytes: int) -> int: ...


class Backend(Protocol):
    """Run an engine inside the engine process."""

    @property
    def num_engines(self) -> int:
        """Return how many engines divide the rank's memory; known once the options are checked."""

    @property
    def max_num_seqs(self) -> int:
        """Return how many sequences run at a time; known once the options are checked."""

    @property
    def memory_fraction(self) -> float | None:
        """Return the fraction of a device's memory that the rank's engines divide; None for vLLM's default."""

    def check_options(self) -> tuple[str, ...]:
        """Check the options without loading the model, and return notes for the log.

        Raises:
            ConfigError: an option is illegal; the nearest legal one is named.
        """

    def load(self, agree_kv: AgreeKvFn) -> EngineInfo:
        """Load the model; see `LoadModel`. `prepare_job` follows."""

    def begin_job(self, spec: EngineSpec) -> tuple[str, ...]:
        """Drop the rows in flight, count from 0 again, and check the sampling of another job; see `BeginJob`.

        Raises:
            ConfigError: it is illegal. Another job may follow.
        """

    @property
    def pooled(self) -> PooledKind | None:
        """What the vectors of the job's task are, once it is prepared; None where text is generated."""

    def prepare_job(self, text_config: EngineTextConfig) -> None:
        """Take the engine's part of the work on text for a job, in a loaded engine; requests may come then."""

    def add_request(self, request: Request) -> None:
        """Add a row.

        Raises:
            RowRefused: this row cannot be generated.
        """

    def step(self) -> list[RowResult | UndecodedRow]:
        """Run the model once and return the rows that finished."""

    def has_unfinished_requests(self) -> bool:
        """Return True if a step would do anything."""

    def stats(self) -> EngineStats:
        """Return the counts so far."""

    def close(self) -> None:
        """Free what would outlive this process: worker processes, shared memory."""
