"""Read LoRA adapters' configurations, and check their files before a model loads.

- Follows vLLM 0.32 (`lora/peft_helper.py`, `lora/lora_model.py`) in which files it reads and which kinds it applies.
  vLLM itself would find a mistake only at a row of the adapter, and its engine would die of it.
- Reads headers of safetensors files, and no weights. Where adapter and model are such files on the disk, the shapes of
  both are compared.
- A repository of the Hub is fetched once on each node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpgen.data.hub import describe_lfs_pointers, fetch_adapter, find_broken_file, is_lfs_pointer
from dpgen.engine.starting.model_damage import find_damage
from dpgen.errors import ConfigError

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_LEGAL_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # `MaxLoRARanks` of vLLM 0.32
_MAX_SLOTS = 4  # each takes memory for all modules at the highest rank; several, so that the next adapter's rows start
_MAX_CPU_ADAPTERS = 16
# Inits that change only the adapter's first weights; others (PiSSA, OLoRA, LoftQ) change the model's own weights.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained tokens",
}
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_LAYER = re.compile(r"(.*?\.(?:layers|h|blocks)\.)\d+\.")


def check_adapters(lora: Mapping[str, str], model: str) -> None:
    """Check every adapter's files, and fetch those of the Hub.

    Args:
        lora: name → folder or Hub name.
        model: the model that the adapters are applied to: a folder, or a name on the Hub.

    Raises:
        ConfigError: files are missing, cut short or LFS pointers; an adapter is none, is of a kind that vLLM can't
            apply, or was made for another model; all of them at once, each with its adapter.
    """
    shapes = {} if not lora else _read_model_shapes(Path(model))
    mistakes = []
    for name, place in lora.items():
        try:
            folder = fetch_adapter(place, is_cached=False)
            mistakes += [f"lora.{name}={place}: {problem}" for problem in _find_problems(folder, shapes)]
        except ConfigError as error:
            mistakes += [f"lora.{name}={place}: {problem}" for problem in error.mistakes]
    if mistakes:
        raise ConfigError(*mistakes)


def find_adapter_folders(lora: Mapping[str, str]) -> dict[str, str]:
    """Return the folder of each adapter, name → absolute path, after `check_adapters` has fetched those of the Hub.

    Raises:
        ConfigError: a folder is no longer there.
    """
    return {name: str(fetch_adapter(place, is_cached=True).absolute()) for name, place in lora.items()}


def choose_num_slots(num_adapters: int, engine: Mapping[str, Any]) -> int:
    """Return `max_loras`, the adapters that an engine has in use at a time: the user's, or at most four.

    Args:
        engine: fields of vLLM's EngineArgs.
    """
    given, most = engine.get("max_loras"), engine.get("max_cpu_loras")
    if isinstance(given, int):
        return given
    return max(1, min(num_adapters, _MAX_SLOTS, most if isinstance(most, int) else num_adapters))


def build_adapter_options(folders: Mapping[str, str], engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of vLLM's EngineArgs that adapters need and the user has not given.

    Args:
        folders: from `find_adapter_folders`.
        engine: fields of EngineArgs that the user has given.

    Raises:
        ConfigError: a given field does not fit the adapters.
    """
    ranks = {name: _compute_max_rank(_read_config(Path(folder))) for name, folder in folders.items()}
    highest = max(ranks, key=lambda name: ranks[name])
    num_slots, mistakes = choose_num_slots(len(folders), engine), []
    if engine.get("enable_lora") is False:
        mistakes.append("engine.enable_lora=false contradicts lora: leave it out")
    given = engine.get("max_lora_rank")
    if isinstance(given, int) and given < ranks[highest]:
        mistakes.append(
            f"engine.max_lora_rank={given}: lora.{highest} has rank {ranks[highest]}; leave it out, or give at least "
            f"{_round_up_rank(ranks[highest])}"
        )
    if mistakes:
        raise ConfigError(*mistakes)
    needed = {
        "enable_lora": True,
        "max_loras": num_slots,
        "max_lora_rank": _round_up_rank(ranks[highest]),
        "max_cpu_loras": max(num_slots, min(len(folders), _MAX_CPU_ADAPTERS)),
    }
    return {name: value for name, value in needed.items() if engine.get(name) is None}


def _find_problems(folder: Path, model_shapes: Mapping[str, list[int] | None]) -> Iterator[str]:
    """Yield what is wrong with an adapter's files, as a sentence each."""
    if not folder.is_dir():
        yield "is a file: must be the directory with the adapter's files"
        return
    if not (folder / _CONFIG).exists():
        yield f"is no adapter: {folder} holds no {_CONFIG}"
        return
    if broken := find_broken_file(folder, _CONFIG):
        yield broken
        return
    config = _read_config(folder)
    if problems := list(_find_config_problems(config)):
        yield from problems
        return
    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        yield f"{folder} holds no weights ({', '.join(_WEIGHTS)}). If a download was cut short, start it again"
    elif is_lfs_pointer(weights):
        yield describe_lfs_pointers(folder, [weights.name])
    elif (damage := find_damage(weights)) is not None:
        yield f"{weights} {damage}. If a download was cut short, start it again"
    elif weights.suffix == ".safetensors":
        yield from _find_wrong_shapes(config, _read_shapes(weights), model_shapes)


def _find_config_problems(config: Any) -> Iterator[str]:
    if not isinstance(config, dict):
        yield f"is no adapter: its {_CONFIG} holds no object"
        return
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        yield f"is an adapter of kind {kind}: vLLM applies adapters of kind LORA only"
        return
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]:
        yield f"is no LoRA adapter: its {_CONFIG} lacks {', '.join(missing)}"
        return
    ranks = {"r": config["r"], **{f"rank_pattern.{key}": value for key, value in _get_rank_pattern(config).items()}}
    wrong = {key: rank for key, rank in ranks.items() if isinstance(rank, bool) or not isinstance(rank, int)}
    wrong |= {key: rank for key, rank in ranks.items() if key not in wrong and not 1 <= rank <= _LEGAL_RANKS[-1]}
    for key, rank in wrong.items():
        yield f"{key}={rank!r} in its {_CONFIG}: vLLM applies ranks from 1 to {_LEGAL_RANKS[-1]}"
    unsupported = [what for key, what in _UNSUPPORTED.items() if config.get(key)]
    if config.get("bias") not in (None, "none") and "biases" not in unsupported:
        unsupported.append("biases")
    if saved := config.get("modules_to_save"):
        unsupported.append(f"whole modules of its own ({', '.join(map(str, saved))})")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        unsupported.append(f"init_lora_weights={init}, which changes the model's own weights")
    if unsupported:
        yield f"vLLM can't apply what it has: {', '.join(unsupported)}. Merge the adapter into the model"


def _find_wrong_shapes(
    config: Mapping[str, Any],
    adapter_shapes: Mapping[str, list[int] | None],
    model_shapes: Mapping[str, list[int] | None],
) -> Iterator[str]:
    """Yield the first tensor of an adapter that does not fit its configuration or the model.

    Args:
        model_shapes: from `_read_model_shapes`.
    """
    tensors = {name: match for name in adapter_shapes if (match := _TENSOR.fullmatch(name))}
    if not tensors:
        yield "is no LoRA adapter: its weights hold no lora_A and lora_B"
    max_rank, layers = _compute_max_rank(config), {match[0] for name in model_shapes if (match := _LAYER.match(name))}
    for name, match in tensors.items():
        module, is_input = match[1], match[2] == "A"
        shape, of_model, layer = adapter_shapes[name], model_shapes.get(f"{module}.weight"), _LAYER.match(module)
        if shape is None:
            continue
        rank, width = shape if is_input else shape[::-1]
        if rank > max_rank:
            yield f"{module} has rank {rank}, but its {_CONFIG} gives at most {max_rank}"
            return
        if layer is not None and layer[0] not in layers and f"{layer[1]}0." in layers:
            yield f"was made for another model: this one has no {layer[0][:-1]}"
            return
        if of_model is not None and not config.get("fan_in_fan_out") and of_model[1 if is_input else 0] != width:
            side = "inputs" if is_input else "outputs"
            yield (
                f"was made for another model: its {module} has {width:,} {side}, and the model's has "
                f"{of_model[1 if is_input else 0]:,}"
            )
            return


def _read_model_shapes(folder: Path) -> dict[str, list[int] | None]:
    """Return the shapes of a model's tensors, as `_read_shapes`; empty unless it is safetensors files in a folder."""
    shapes: dict[str, list[int] | None] = {}
    if folder.is_dir():
        for path in folder.glob("*.safetensors"):
            if path.exists() and find_damage(path) is None:  # else `check_model_files` has reported it
                shapes |= _read_shapes(path)
    return shapes


def _read_shapes(path: Path) -> dict[str, list[int] | None]:
    """Return the shapes of a file's matrices of floats, by name; None for other tensors, whose shapes say less."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: entry["shape"] if entry.get("dtype") in _FLOAT_TYPES and len(entry.get("shape", ())) == 2 else None
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read_config(folder: Path) -> Any:
    return json.loads((folder / _CONFIG).read_bytes())


def _get_rank_pattern(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ranks of modules that have one of their own, by a pattern of their names."""
    pattern = config.get("rank_pattern")
    return pattern if isinstance(pattern, dict) else {}


def _compute_max_rank(config: Mapping[str, Any]) -> int:
    return max(int(rank) for rank in (config["r"], *_get_rank_pattern(config).values()))


def _round_up_rank(rank: int) -> int:
    """Return the lowest of vLLM's values for `max_lora_rank` that holds the rank."""
    return next(legal for legal in _LEGAL_RANKS if legal >= rank)
