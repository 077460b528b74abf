"""Estimate what a run will take, from a preview of its rows and a model of its engines.

- The engine model comes from an earlier run's measurements, else from the model's size and the GPU's name.
- The run is simulated, with the real claims and admission. Of a large run a part is: the rest is added as work in full
  batches, since only a run's end is otherwise.

Limits: start-up, prefix caches and speculative decoding are not counted. Lengths of completions are guesses, unless an
earlier run tells them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpgen.config.schema import Config
from dpgen.config.sections import WorkConfig
from dpgen.data.model_facts import estimate_model_size
from dpgen.engine.fake_backend import FakeOptions
from dpgen.errors import ConfigError
from dpgen.monitoring.earlier_run import EarlierRun
from dpgen.monitoring.preview import Preview
from dpgen.monitoring.preview_rows import ExaminedRows
from dpgen.scheduling.order import RowOrder
from dpgen.simulation import reference
from dpgen.simulation.hardware import (
    GPUS,
    REFERENCE_GPU,
    compute_free_bytes,
    estimate_cost_model,
    find_gpu,
    read_gpu_name,
)
from dpgen.simulation.lengths import sample_lengths
from dpgen.simulation.simulator import EngineCostModel, Workload, simulate

READS_ONLY = "prompts are only read"  # where an estimate's lengths come from, if nothing is generated
_ASSUMED_LENGTH = 256  # generated tokens of a row, as `dpgen.scheduling.order` assumes
_MAX_SIMULATED = 20_000  # sequences


@dataclass(frozen=True)
class EstimateOptions:
    """Say what an estimate rests on.

    Attributes:
        gpu: name of the GPU; None for that of this machine.
        lengths: generated tokens of each row, as `sample_lengths` takes them; None to find or assume them.
        earlier: the run whose measurements count; None for none.
    """

    gpu: str | None = None
    lengths: str | None = None
    earlier: EarlierRun | None = None


@dataclass(frozen=True)
class Estimate:
    """Hold what a run will take.

    Attributes:
        num_prompt_tokens, num_generated_tokens: over all rows that an engine takes.
        max_generated_tokens: if each completion were as long as its row allows; None where nothing limits some.
        gpu_hours: 0 where no GPU is used.
        engine: constants of one engine.
        engine_source, lengths_source: where these come from.
        is_rough: True unless the constants were measured.
        notes: one sentence each.
    """

    num_prompt_tokens: int
    num_generated_tokens: int
    max_generated_tokens: int | None
    wall_s: float
    num_gpus: int
    gpu_hours: float
    engine: EngineCostModel
    engine_source: str
    lengths_source: str
    is_rough: bool
    notes: list[str]


def estimate_run(
    config: Config, preview: Preview, examined: ExaminedRows, model_config: Any, options: EstimateOptions
) -> Estimate | None:
    """Return the estimate; None if no examined row is sound.

    Args:
        model_config: as `load_model_config` returns it.

    Raises:
        ConfigError: `options.gpu` or `options.lengths` is wrong.
    """
    if not preview.num_sound:
        return None
    engine, source, is_rough, notes = _find_engine(config, model_config, options)
    work, total, max_generated, lengths_source = _make_workload(config, preview, examined, options)
    num_engines = preview.num_ranks // preview.ranks_per_engine
    wall_s = _simulate(engine, work, total, num_engines, config.work)
    num_gpus = 0 if config.run.engine == "fake" else preview.num_ranks * config.gpus_per_rank
    scale = total / len(work.lengths)
    return Estimate(
        round(float(work.prompt_lengths.sum()) * scale),
        round(float(work.lengths.sum()) * scale),
        max_generated,
        round(wall_s, 3),
        num_gpus,
        round(wall_s * num_gpus / 3600, 4),
        engine,
        source,
        lengths_source,
        is_rough,
        notes,
    )


def _find_engine(
    config: Config, model_config: Any, options: EstimateOptions
) -> tuple[EngineCostModel, str, bool, list[str]]:
    """Return the engine's constants, where they come from, whether they are rough, and notes."""
    earlier = options.earlier
    if config.run.engine == "fake":
        fake = FakeOptions(**config.engine)
        return EngineCostModel(fake.step_s, fake.seq_s, max_num_seqs=fake.max_num_seqs), "engine.step_s", False, []
    model, source, notes = _estimate_engine(config, model_config, options.gpu)
    if earlier is None:
        return model, source, True, notes
    given = config.engine.get("max_num_seqs")
    limits = {"max_num_seqs": given or earlier.max_num_seqs or model.max_num_seqs, "kv_tokens": earlier.kv_tokens}
    model = dataclasses.replace(model, **{name: value for name, value in limits.items() if value is not None})
    if earlier.model != config.model:
        notes.append(f"{earlier.path} ran another model ({earlier.model}), so that its speed says little")
    if not earlier.num_ranks:
        notes.append(f"{earlier.path} has not measured its engines yet: only the lengths of its rows count")
        return model, source, True, notes
    return _fit_to_run(model, earlier), f"measured in {earlier.path}", earlier.model != config.model, notes


def _estimate_engine(config: Config, model_config: Any, gpu_name: str | None) -> tuple[EngineCostModel, str, list[str]]:
    name = gpu_name or read_gpu_name()
    gpu = None if name is None else find_gpu(name)
    notes = []
    if gpu is None and gpu_name is not None:
        raise ConfigError(f"--gpu={gpu_name}: must be one of {', '.join(known.name for known in GPUS)}")
    if gpu is None:
        found = "no GPU is found here" if name is None else f"this machine's {name} is not known"
        notes.append(f"{found}, so the estimate is for {REFERENCE_GPU.name}: name another with --gpu")
        gpu = REFERENCE_GPU
    num_gpus = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    size = estimate_model_size(config.model, model_config, config.engine)
    if size is None:
        notes.append("the model's size is unknown, so the estimate is for one of 8 billion parameters")
        model = EngineCostModel(
            reference.STEP_MS / 1e3, reference.SEQ_US / 1e6, reference.KV_NS / 1e9, reference.PREFILL_US / 1e6
        )
        return model, f"a model of 8 billion parameters on {REFERENCE_GPU.name}", notes
    if compute_free_bytes(size, gpu, num_gpus, config.engine) <= 0:
        notes.append(
            f"the weights ({size.weight_bytes / 1e9:,.0f} GB) do not fit in {num_gpus} x {gpu.name} of "
            f"{gpu.memory / 1e9:,.0f} GB: set a larger parallel.tensor_parallel_size"
        )
    source = f"{_format_params(size.num_params)} parameters on {num_gpus} x {gpu.name}, by their size and name"
    return estimate_cost_model(size, gpu, num_gpus, config.engine), source, notes


def _format_params(number: float) -> str:
    return f"{number / 1e9:,.1f} billion" if number >= 1e8 else f"{number / 1e6:,.1f} million"


def _fit_to_run(model: EngineCostModel, earlier: EarlierRun) -> EngineCostModel:
    """Return the model with all times scaled so that it takes as long for each rank's rows as they took."""
    simulated_s = 0.0
    for num_rows, num_prompt, num_generated in zip(
        earlier.num_rows, earlier.num_prompt_tokens, earlier.num_generated_tokens, strict=True
    ):
        total = max(1, round(num_rows * earlier.samples_per_row))
        count = min(total, _MAX_SIMULATED)
        lengths = np.full(count, max(1, round(num_generated / total)), dtype=np.int64)
        if len(earlier.lengths):
            drawn = np.random.default_rng(0).choice(np.maximum(1, earlier.lengths), count)
            lengths = np.maximum(1, drawn * lengths.mean() / drawn.mean()).astype(np.int64)
        prompts = np.full(count, round(num_prompt / max(1, num_rows)), dtype=np.int64)
        workload = Workload(lengths, prompts, RowOrder(np.arange(count)))
        simulated_s += _simulate(model, workload, total, 1, WorkConfig())
    factor = sum(earlier.busy_s) / simulated_s if simulated_s else 1.0
    names = ("step_s", "seq_s", "kv_s", "prefill_s")
    return dataclasses.replace(model, **{name: factor * getattr(model, name) for name in names})


def _make_workload(
    config: Config, preview: Preview, examined: ExaminedRows, options: EstimateOptions
) -> tuple[Workload, int, int | None, str]:
    """Return the sequences to simulate, how many the run has, the most tokens it can generate, and their source."""
    sound = np.flatnonzero(examined.is_sound)
    samples = examined.num_samples[sound]
    total = round(float(samples.sum()) * preview.num_rows / len(examined))
    positions = np.repeat(sound, samples)
    if len(positions) != total or total > _MAX_SIMULATED:
        positions = np.random.default_rng(0).choice(positions, min(total, _MAX_SIMULATED))
    limits = examined.max_tokens[positions]
    lengths, source = _find_lengths(config, options, len(positions))
    lengths = np.maximum(1, np.where(limits >= 0, np.minimum(lengths, limits), lengths))
    all_limits = np.repeat(examined.max_tokens[sound], samples)
    max_generated = None if (all_limits < 0).any() else round(float(all_limits.mean()) * total)
    workload = Workload(lengths, examined.num_tokens[positions], RowOrder(np.arange(len(positions))))
    return workload, total, max_generated, source


def _find_lengths(config: Config, options: EstimateOptions, count: int) -> tuple[np.ndarray, str]:
    """Return tokens to generate of some sequences, int64[count], and where they come from."""
    earlier = options.earlier
    if config.prompt.completion_column is not None:
        return np.ones(count, dtype=np.int64), "given completions, which are only read"
    if config.pooling is not None:
        return np.ones(count, dtype=np.int64), READS_ONLY
    if options.lengths is not None:
        return sample_lengths(options.lengths, count), f"--lengths={options.lengths}"
    if earlier is not None and len(earlier.lengths):
        drawn: np.ndarray = np.random.default_rng(1).choice(earlier.lengths, count)
        return drawn, f"as in {earlier.path}"
    source = f"assumed: {_ASSUMED_LENGTH} tokens, or the row's max_tokens where those are fewer; --lengths takes better"
    return np.full(count, _ASSUMED_LENGTH, dtype=np.int64), source


def _simulate(model: EngineCostModel, workload: Workload, total: int, num_engines: int, work: WorkConfig) -> float:
    """Return the seconds that `total` sequences take, of which the workload holds all or a fair sample."""
    wall_s = simulate(model, workload, num_engines, work).wall_s
    num_others = total - len(workload.lengths)
    if num_others <= 0:
        return wall_s
    work_s = model.compute_full_batches_s(workload.lengths, workload.prompt_lengths, num_engines)
    return wall_s + work_s * num_others / len(workload.lengths)
