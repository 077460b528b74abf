"""List the settings that a job may be tuned by, with what each changes.

- Only settings that leave the distribution of the results alone are tried.
- None is part of the run's identity, so that rows of all trials belong to the run. Speculative decoding is the
  exception: it draws other samples, so it is tried only where it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpgen.config.schema import Config
from dpgen.config.sections import ParallelConfig
from dpgen.errors import ConfigError

Changes = Literal["speed", "numerics", "draws"]

ENGINES_PER_RANK = "parallel.engines_per_rank"
TENSOR_PARALLEL = "parallel.tensor_parallel_size"
MAX_NUM_SEQS = "engine.max_num_seqs"
_BATCHED_TOKENS = "engine.max_num_batched_tokens"
_SPECULATIVE = "engine.speculative_config"

# What each key changes. Other sizes of batches, or other parts of a sum on each GPU, round differently.
CHANGES: dict[str, Changes] = {
    MAX_NUM_SEQS: "numerics",
    _BATCHED_TOKENS: "numerics",
    ENGINES_PER_RANK: "numerics",
    TENSOR_PARALLEL: "numerics",
    "engine.performance_mode": "numerics",
    "engine.enable_prefix_caching": "speed",
    "engine.max_cudagraph_capture_size": "speed",
    _SPECULATIVE: "draws",
}
CHANGES_HELP = (
    ("speed", "how fast rows come, and nothing else"),
    ("numerics", "how float sums are rounded, so that single rows may get another text of the same distribution"),
    ("draws", "which sample of the same distribution a row gets; part of the run's identity"),
)
SPECULATIVE_METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    "suffix": {"method": "suffix", "num_speculative_tokens": 16},
}
_VLLM_OPTIONS = frozenset(
    ["max_num_batched_tokens", "max_cudagraph_capture_size", "enable_prefix_caching", "performance_mode"]
)
_MAX_ENGINES_PER_RANK = 4
_MAX_GRAPH_SEQS = 512  # vLLM captures graphs up to here by itself
_LARGEST_LIMIT = 1024
_MIN_CACHED_FRACTION = 0.01  # of all prompt tokens, below which a prefix cache is not missed


@dataclass(frozen=True)
class Candidate:
    """Describe one change that may pay.

    Attributes:
        overrides: configuration key → value.
        expected_gain: of the throughput, as a fraction: a guess before it is measured.
        climbs: whether it may need another number of sequences.
        start_limit: sequences of each engine to begin with; None for the best number so far.
        follows: the candidate to try after this one, if this one was better.
    """

    overrides: Mapping[str, Any]
    expected_gain: float
    climbs: bool = False
    start_limit: int | None = None
    follows: Candidate | None = None

    @property
    def changes(self) -> Changes:
        """Return the most that it changes."""
        return find_changes(self.overrides)


@dataclass(frozen=True)
class Facts:
    """Hold what is known once the job's own settings have been tried.

    Attributes:
        num_gpus: of the job.
        has_gpus: False on a CPU, and with the fake engine.
        max_num_seqs: the best number of sequences so far.
        is_largest: no larger number was measured.
        prompt_fraction: prompt tokens over all tokens; None where unknown.
        cached_fraction: prompt tokens found in the prefix cache, over all prompt tokens; None where unknown.
        num_engines_per_rank: of the first trial.
        engine_options: names of the engine's options; empty where unknown.
        batched_tokens: `max_num_batched_tokens` where the configuration has none.
    """

    num_gpus: int
    has_gpus: bool
    max_num_seqs: int
    is_largest: bool = False
    prompt_fraction: float | None = None
    cached_fraction: float | None = None
    num_engines_per_rank: int = 1
    engine_options: frozenset[str] = frozenset()
    batched_tokens: int = 8192


def check_tunable(config: Config) -> None:
    """Raise ConfigError if trials can't be made of a configuration's job."""
    mistakes = []
    if config.parallel.launcher == "external":
        mistakes.append("parallel.launcher=external: dpgen tune restarts engines, and these can't restart alone")
    if config.run.resume == "never":
        mistakes.append("run.resume=never: the rows of a trial could not be kept by the next; leave it out to tune")
    if config.pooling is not None:
        mistakes.append(f"task={config.task}: dpgen tune measures generated tokens, and this task generates none")
    if mistakes:
        raise ConfigError(*mistakes)


def find_changes(overrides: Mapping[str, Any]) -> Changes:
    """Return the most that some settings change."""
    order: tuple[Changes, ...] = ("speed", "numerics", "draws")
    return max((CHANGES[key] for key in overrides), key=order.index, default="speed")


def draws_others(overrides: Mapping[str, Any]) -> bool:
    """Return True if rows get other samples with some settings, so that they are another run's."""
    return any(CHANGES.get(key) == "draws" for key in overrides)


def find_base_limit(config: Config) -> int | None:
    """Return the sequences of each engine as the job is configured; None for the engine's default."""
    limit = config.engine.get("max_num_seqs")
    return limit if isinstance(limit, int) and limit > 0 else None


def choose_first_overrides(config: Config) -> dict[str, Any]:
    """Return what the first engine is started with, so that it can run more sequences than are configured."""
    base = find_base_limit(config)
    if base is None or base >= _LARGEST_LIMIT:
        return {}
    return {MAX_NUM_SEQS: min(4 * base, max(base, _LARGEST_LIMIT))}


def list_candidates(config: Config, facts: Facts, speculative: Sequence[str] = ()) -> list[Candidate]:
    """Return the changes that may pay, the most promising first.

    Args:
        speculative: which of `SPECULATIVE_METHODS` were asked for.
    """
    candidates = [
        *(Candidate({_SPECULATIVE: SPECULATIVE_METHODS[method]}, 0.1) for method in speculative),
        *_list_engine_counts(config, facts),
        *_list_tensor_sizes(config, facts),
        *_list_engine_options(config, facts),
    ]
    return sorted(candidates, key=lambda candidate: -candidate.expected_gain)


def list_engine_options(engine: str) -> frozenset[str]:
    """Return the options that may be tried with `run.engine`; vLLM has had all of them since 0.26."""
    return _VLLM_OPTIONS if engine == "vllm" else frozenset()


def has_engines_per_rank() -> bool:
    """Return True if this version can run several engines below a rank."""
    return any(declared.name == "engines_per_rank" for declared in dataclasses.fields(ParallelConfig))


def _list_engine_counts(config: Config, facts: Facts) -> Iterator[Candidate]:
    """Yield one engine more, and then one more again; and one less."""
    if not has_engines_per_rank() or not facts.has_gpus or config.gpus_per_rank > 1:
        return
    current, more = facts.num_engines_per_rank, None
    for number in range(_MAX_ENGINES_PER_RANK, current, -1):
        more = Candidate({ENGINES_PER_RANK: number}, 0.05, climbs=True, follows=more)
    fewer = None
    for number in range(1, current):
        fewer = Candidate({ENGINES_PER_RANK: number}, 0.03, climbs=True, follows=fewer)
    yield from (candidate for candidate in (more, fewer) if candidate is not None)


def _list_tensor_sizes(config: Config, facts: Facts) -> Iterator[Candidate]:
    """Yield other divisions of the same GPUs into ranks; a model that does not fit is a trial that fails."""
    parallel = config.parallel
    size, fixed = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if not facts.has_gpus or parallel.enable_expert_parallel or parallel.share_devices:
        return
    for other, gain in ((size // 2, 0.1), (2 * size, 0.04)):
        if other >= 1 and facts.num_gpus % (other * fixed) == 0 and facts.num_gpus >= other * fixed and other != size:
            alone = {ENGINES_PER_RANK: 1} if other * fixed > 1 else {}  # several GPUs are one engine's
            yield Candidate({TENSOR_PARALLEL: other, **alone}, gain, climbs=True)


def _list_engine_options(config: Config, facts: Facts) -> Iterator[Candidate]:
    engine, knows = config.engine, facts.engine_options
    if facts.is_largest and (doubled := 2 * facts.max_num_seqs) <= _LARGEST_LIMIT:
        largest = min(2 * doubled, _LARGEST_LIMIT)
        yield Candidate({MAX_NUM_SEQS: largest}, 0.05, climbs=True, start_limit=doubled)
    if "max_num_batched_tokens" in knows:
        gain = 0.08 if (facts.prompt_fraction or 0) > 0.7 else 0.015
        current = engine.get("max_num_batched_tokens") or facts.batched_tokens
        yield Candidate({_BATCHED_TOKENS: 2 * current}, gain)
        if current // 2 >= facts.max_num_seqs:
            yield Candidate({_BATCHED_TOKENS: current // 2}, gain / 2)
    captures_graphs = facts.has_gpus and not {*engine} & {"enforce_eager", "cudagraph_capture_sizes"}
    largest_graph = engine.get("max_cudagraph_capture_size") or _MAX_GRAPH_SEQS
    if "max_cudagraph_capture_size" in knows and captures_graphs and facts.max_num_seqs > largest_graph:
        yield Candidate({"engine.max_cudagraph_capture_size": facts.max_num_seqs}, 0.03)
    finds_nothing = facts.cached_fraction is not None and facts.cached_fraction < _MIN_CACHED_FRACTION
    if "enable_prefix_caching" in knows and finds_nothing and engine.get("enable_prefix_caching") is not False:
        yield Candidate({"engine.enable_prefix_caching": False}, 0.01)
    if "performance_mode" in knows and "performance_mode" not in engine:
        yield Candidate({"engine.performance_mode": "throughput"}, 0.01)
