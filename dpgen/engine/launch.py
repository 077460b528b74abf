"""From a configuration and a place in the job to an engine process: its spec, its devices, its prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpgen.config.schema import Config
from dpgen.data.detokenize import Detokenizer, fast_tokenizer
from dpgen.data.render import Renderer, TokenizerSettings, load_tokenizer, reason_for_engine
from dpgen.data.tokenizer import looks_like_path
from dpgen.distributed.group import Group
from dpgen.distributed.layout import World
from dpgen.distributed.topology import Topology, cores_of_rank, gpus_of_rank
from dpgen.engine.messages import EngineSpec, TextWork
from dpgen.engine.process import EngineProcess, engine_environment
from dpgen.errors import ConfigError
from dpgen.log import speaker
from dpgen.scheduling.request_source import RenderPrompt


def engine_spec(config: Config, topology: Topology, world: World | None) -> EngineSpec:
    """What this rank's engine is made from."""
    return EngineSpec(
        kind=config.run.engine,
        model=_model(config),
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


def engine_starter(
    config: Config, topology: Topology, group: Group, world: World | None
) -> Callable[[EngineSpec], EngineProcess]:
    """What starts an engine on this rank's own share of its node's devices. Collective.

    Raises:
        ConfigError: the model's folder isn't there, or the node has too few GPUs for its ranks.
    """
    group.agree(lambda: _check_model(config))
    affinities = group.all_gather_object((topology.node, frozenset(os.sched_getaffinity(0))))
    on_node = [cores for node, cores in affinities if node == topology.node]
    visible = visible_gpus(os.environ) if config.run.engine == "vllm" else []
    share = config.parallel.share_devices
    gpus = group.agree(lambda: gpus_of_rank(topology, visible, config.gpus_per_rank, share=share) if visible else None)
    if gpus and world is not None:
        gpus = visible  # its neighbours' too: vLLM takes the one of its LOCAL_RANK, and reaches the others directly
    cores = None if gpus else cores_of_rank(on_node, min(topology.local_rank, len(on_node) - 1))
    environment = engine_environment(os.environ, gpus=gpus, num_cores=len(cores or ()), log_level=config.run.log_level)
    if world is not None:
        environment |= world.as_environment()
        if len(visible) == 1:  # the launcher has bound each process to a GPU of its own
            environment["LOCAL_RANK"] = "0"
    say = speaker(topology.dp_rank, "engine")
    return lambda spec: EngineProcess(spec, environment, cores, say)


@dataclass(frozen=True)
class Texts:
    """The work on text, as it is shared out between the rank and its engine.

    Attributes:
        render: makes a row's prompt: token ids, or what the engine is to tokenize.
        detokenizer: makes the text of finished rows; None where the engine does it all.
        in_engine: what is left to the engine.
    """

    render: RenderPrompt
    detokenizer: Detokenizer | None = None
    in_engine: TextWork = field(default_factory=TextWork)


def open_tokenizer(config: Config, tell: Callable[[str], None]) -> Texts:
    """Loads what makes prompts into tokens, and tokens into text.

    Raises:
        ConfigError: the tokenizer can't be loaded, or a chat has no chat template.
    """
    settings = config.prompt
    if config.run.engine == "fake":
        from dpgen.engine.fake_backend import FakeTokenizer

        fake, text_of = FakeTokenizer(), Renderer(settings, None)
        return Texts(lambda row: (fake.encode(str(text_of.prompt(row))), None))
    which = TokenizerSettings.from_engine(_model(config), config.engine)
    reason = reason_for_engine(which)
    if reason is not None:
        tell(f"prompts are tokenized in the engine process: {reason}")
        raw = Renderer(settings, None)
        return Texts(lambda row: (None, raw.prompt(row)), in_engine=TextWork(settings))
    tokenizer = load_tokenizer(which)
    renderer, fast = Renderer(settings, tokenizer), fast_tokenizer(tokenizer)
    return Texts(
        lambda row: (renderer.render(row), None),
        None if fast is None else Detokenizer(fast),
        TextWork(leaves_text=fast is not None),
    )


def _model(config: Config) -> str:
    return os.path.expanduser(config.model)


def _check_model(config: Config) -> None:
    """Refuses a folder that isn't there: vLLM would take its name for one on the Hub, and complain about that."""
    if config.run.engine == "vllm" and looks_like_path(config.model) and not os.path.exists(_model(config)):
        raise ConfigError(f"model={config.model}: there is no such folder")


def is_cold(config: Config, environ: Mapping[str, str]) -> bool:
    """Whether loading the model would fill a cache that the ranks of a node share: of weights, or of compiled code."""
    if config.run.engine != "vllm":
        return False
    return not _has_weights(config.model) or (
        not config.engine.get("enforce_eager") and not _has_entries(_compile_cache(environ))
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


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA names them, without loading CUDA here."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each.strip() for each in named.split(",") if each.strip() not in ("", "-1")]
    nodes = [name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()]
    return [str(index) for index in range(len(nodes))]
