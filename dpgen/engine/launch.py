"""From a configuration and a place in the job to an engine process: its spec, its devices, its prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpgen.config.schema import Config
from dpgen.data.detokenize import Detokenizer, fast_tokenizer
from dpgen.data.render import PromptRenderer, TokenizerConfig, find_reason_to_tokenize_in_engine, load_tokenizer
from dpgen.data.tokenizer import looks_like_path
from dpgen.distributed.group import RankGroup
from dpgen.distributed.layout import EngineWorld
from dpgen.distributed.topology import Topology, assign_cores, assign_gpus
from dpgen.engine.messages import EngineSpec, EngineTextConfig
from dpgen.engine.process import EngineProcess, build_engine_env
from dpgen.errors import ConfigError
from dpgen.log import setup_logging
from dpgen.scheduling.request_source import RenderFn


def build_engine_spec(config: Config, topology: Topology, world: EngineWorld | None) -> EngineSpec:
    """What this rank's engine is made from."""
    return EngineSpec(
        kind=config.run.engine,
        model=_expand_model_path(config),
        options=dict(config.engine),
        sampling=config.sampling_fields,
        sampling_columns=tuple(config.sampling_columns),
        sampling_by_rank=tuple(config.sampling_by_rank),
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
        local_size=topology.local_size,
        enable_expert_parallel=config.parallel.enable_expert_parallel,
        world=world,
        token_ids=config.output.token_ids,
    )


def make_engine_factory(
    config: Config, topology: Topology, group: RankGroup, world: EngineWorld | None
) -> Callable[[EngineSpec], EngineProcess]:
    """What starts an engine on this rank's own share of its node's devices. Collective.

    Raises:
        ConfigError: the model's folder isn't there, or the node has too few GPUs for its ranks.
    """
    group.run_on_all_ranks(lambda: _check_model(config))
    affinities = group.all_gather_object((topology.node, frozenset(os.sched_getaffinity(0))))
    on_node = [cores for node, cores in affinities if node == topology.node]
    visible = visible_gpus(os.environ) if config.run.engine == "vllm" else []
    share = config.parallel.share_devices
    gpus = group.run_on_all_ranks(
        lambda: assign_gpus(topology, visible, config.gpus_per_rank, share=share) if visible else None
    )
    if gpus and world is not None:
        gpus = visible  # its neighbours' too: vLLM takes the one of its LOCAL_RANK, and reaches the others directly
    cores = None if gpus else assign_cores(on_node, min(topology.local_rank, len(on_node) - 1))
    environment = build_engine_env(os.environ, gpus=gpus, num_cores=len(cores or ()), log_level=config.run.log_level)
    if world is not None:
        environment |= world.to_env()
        if len(visible) == 1:  # the launcher has bound each process to a GPU of its own
            environment["LOCAL_RANK"] = "0"
    say = setup_logging(topology.dp_rank, "engine")
    return lambda spec: EngineProcess(spec, environment, cores, say)


@dataclass(frozen=True)
class TextPipeline:
    """The work on text, as it is shared out between the rank and its engine.

    Attributes:
        render: makes a row's prompt: token ids, or what the engine is to tokenize.
        detokenizer: makes the text of finished rows; None where the engine does it all.
        in_engine: what is left to the engine.
    """

    render: RenderFn
    detokenizer: Detokenizer | None = None
    engine_text_config: EngineTextConfig = field(default_factory=EngineTextConfig)


def build_text_pipeline(config: Config, tell: Callable[[str], None]) -> TextPipeline:
    """Loads what makes prompts into tokens, and tokens into text.

    Raises:
        ConfigError: the tokenizer can't be loaded, or a chat has no chat template.
    """
    settings = config.prompt
    if config.run.engine == "fake":
        from dpgen.engine.fake_backend import FakeTokenizer

        fake, text_of = FakeTokenizer(), PromptRenderer(settings, None)
        return TextPipeline(lambda row: (fake.encode(str(text_of.build_prompt(row))), None))
    which = TokenizerConfig.from_engine(_expand_model_path(config), config.engine)
    reason = find_reason_to_tokenize_in_engine(which)
    if reason is not None:
        tell(f"prompts are tokenized in the engine process: {reason}")
        raw = PromptRenderer(settings, None)
        return TextPipeline(lambda row: (None, raw.build_prompt(row)), engine_text_config=EngineTextConfig(settings))
    tokenizer = load_tokenizer(which)
    renderer, fast = PromptRenderer(settings, tokenizer), fast_tokenizer(tokenizer)
    return TextPipeline(
        lambda row: (renderer.tokenize_row(row), None),
        None if fast is None else Detokenizer(fast),
        EngineTextConfig(skip_detokenize=fast is not None),
    )


def _expand_model_path(config: Config) -> str:
    return os.path.expanduser(config.model)


def _check_model(config: Config) -> None:
    """Refuses a folder that isn't there: vLLM would take its name for one on the Hub, and complain about that."""
    if config.run.engine == "vllm" and looks_like_path(config.model) and not os.path.exists(_expand_model_path(config)):
        raise ConfigError(f"model={config.model}: there is no such folder")


def has_cold_caches(config: Config, environ: Mapping[str, str]) -> bool:
    """Whether loading the model would fill a cache that the ranks of a node share: of weights, or of compiled code."""
    if config.run.engine != "vllm":
        return False
    return not _has_weights(config.model) or (
        not config.engine.get("enforce_eager") and not _is_populated(_compile_cache(environ))
    )


def _has_weights(model: str) -> bool:
    if os.path.isdir(os.path.expanduser(model)):
        return True
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(isinstance(try_to_load_from_cache(model, name), str) for name in names)


def _compile_cache(environ: Mapping[str, str]) -> Path:
    root = environ.get("VLLM_CACHE_ROOT") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm"
    return Path(root) / "torch_compile_cache"


def _is_populated(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA names them, without loading CUDA here."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip() not in ("", "-1")]
    nodes = [name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()]
    return [str(index) for index in range(len(nodes))]
