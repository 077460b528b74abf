"""Which tokenizer vLLM would use for a model, whether transformers gives the same tokens, and loading it.

Follows vLLM 0.32: `vllm/config/model.py` (defaults, an architecture's mode), `vllm/tokenizers/registry.py`
and `hf.py` (mode "auto", loading), `vllm/renderers/base.py` (tokenization of multi-modal models).
Where there is a doubt the answer is "not the same": the rows are then rendered by vLLM, in the engine
process, which takes time from the model but is right by construction.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpgen.errors import ConfigError
from dpgen.imports import imports_without_gc

# Files that make vLLM tokenize, or find a chat template, by rules that transformers' tokenizer does not know.
_VLLM_ONLY_FILES = {
    "tekken.json": "it has a Mistral tokenizer",
    "tokenizer.model.v*": "it has a Mistral tokenizer",
    "processor_config.json": "it has a multi-modal processor",
    "preprocessor_config.json": "it has a multi-modal processor",
    "chat_template.json": "its processor has a chat template of its own",
    "sentence_*_config.json": "it has sentence-transformers settings (do_lower_case)",
}
# Architectures that "auto" gives a mode of vLLM's own.
_TELLTALE_ARCHITECTURES = ("MoonshotKimia", "KimiK3", "DeepseekV32", "DeepseekV4", "Inkling")
# Engine options that change how prompts are rendered, with the test for a value that does.
_TELLTALE_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "enable_prompt_embeds": bool,
    "hf_config_path": bool,
    "hf_overrides": lambda value: callable(value) or bool({"architectures", "model_type"} & set(value or ())),
    "model_impl": lambda value: value == "terratorch",
    "config_format": lambda value: value == "mistral",
}
# Environment variables by which vLLM takes the tokenizer from elsewhere, or swaps its inside.
_TELLTALE_ENVIRONMENT = ("VLLM_USE_MODELSCOPE", "VLLM_MODEL_REDIRECT_PATH", "VLLM_USE_FASTOKENS")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of a model.

    Attributes:
        name: a folder, or a repository on the Hugging Face Hub.
        revision: of that repository.
        trust_remote_code: whether code of that repository may run.
        tokenizer_mode: vLLM's word, in lower case: "auto", "hf", "mistral", ...
        model: the model, whose configuration decides what "auto" is; None when it is `name`.
        model_revision: of the model's repository.
        engine_reason: an engine option that only vLLM can honour when it renders; None when there is none.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer_mode: str = "auto"
    model: str | None = None
    model_revision: str | None = None
    engine_reason: str | None = None

    @classmethod
    def from_engine(cls, model: str, engine: Mapping[str, Any]) -> TokenizerConfig:
        """What vLLM would make of a model and engine options.

        Args:
            model: `EngineArgs.model`.
            engine: other fields of `EngineArgs`; those that do not matter here are ignored.
        """
        revision = engine.get("revision")
        name, tokenizer_revision = engine.get("tokenizer"), engine.get("tokenizer_revision")
        telltale = (key for key, matters in _TELLTALE_OPTIONS.items() if matters(engine.get(key)))
        option = next(telltale, None)
        return cls(
            name=model if name is None else str(name),
            # As vLLM: the model's revision is the default even when the tokenizer is another repository's.
            revision=revision if tokenizer_revision is None else tokenizer_revision,
            trust_remote_code=bool(engine.get("trust_remote_code", False)),
            tokenizer_mode=str(engine.get("tokenizer_mode") or "auto").lower(),
            model=model,
            model_revision=revision,
            engine_reason=None if option is None else f"the engine option {option} changes how vLLM renders",
        )


def is_supported_by_transformers(settings: TokenizerConfig) -> bool:
    """Whether transformers' tokenizer gives the tokens that vLLM would; see `find_reason_to_tokenize_in_engine`."""
    return find_reason_to_tokenize_in_engine(settings) is None


def find_reason_to_tokenize_in_engine(settings: TokenizerConfig) -> str | None:
    """Why prompts must be rendered by vLLM itself, as a clause for the log; None when transformers will do.

    It reads a few small files of the model's and the tokenizer's repositories. What cannot be read counts for
    nothing: `load_tokenizer` says what is wrong with it.
    """
    if settings.engine_reason is not None:
        return settings.engine_reason
    for variable in _TELLTALE_ENVIRONMENT:
        if os.environ.get(variable, "").strip().lower() not in ("", "0", "false"):
            return f"{variable} is set"
    if settings.tokenizer_mode not in ("auto", "hf"):
        return f"tokenizer_mode={settings.tokenizer_mode} is vLLM's own"
    if "://" in settings.name or Path(settings.name).is_file():
        return f"{settings.name} is neither a folder nor a repository"
    places = {(settings.name, settings.revision)}
    if settings.model is not None:
        places.add((settings.model, settings.model_revision))
    for name, revision in sorted(places, key=str):
        for reason in _reasons(name, revision):
            return f"{name}: {reason}"
    return None


def load_tokenizer(settings: TokenizerConfig) -> Any:
    """The transformers tokenizer, as vLLM loads it.

    Returns:
        A `transformers.PreTrainedTokenizerBase`.

    Raises:
        ConfigError: it is not there, or cannot be loaded.
    """
    if looks_like_path(settings.name) and not Path(settings.name).exists():
        raise ConfigError(f"no tokenizer at {settings.name}: there is no such folder")
    with imports_without_gc():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.name,
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
            truncation_side="left",
        )
    # A repository's own code may raise anything, and a broken tokenizer.json raises a plain Exception.
    except Exception as error:
        raise ConfigError(f"cannot load the tokenizer of {settings.name}: {_first_line(error)}") from error
    # Not for us: a prompt that is too long is refused by the engine, with the limit that counts.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _reasons(name: str, revision: str | None) -> Iterator[str]:
    folder = _fetch_config_files(name, revision)
    if folder is None:
        return
    for pattern, reason in _VLLM_ONLY_FILES.items():
        # At any depth, as vLLM looks for Mistral's files.
        if next(folder.rglob(pattern), None) is not None:
            yield reason
    yield from _reasons_in_config(folder / "config.json")


def _reasons_in_config(path: Path) -> Iterator[str]:
    # Where they are defined has changed; that these modules have them has not.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return  # a tokenizer alone has no config.json, and needs none
    if not isinstance(config, dict):
        return
    for architecture in config.get("architectures") or ():
        if str(architecture).startswith(_TELLTALE_ARCHITECTURES):
            yield f"vLLM has a tokenizer mode of its own for {architecture}"
    if config.get("speculators_config") is not None:
        yield "it is a speculator, which vLLM replaces by its target model"
    model_type = config.get("model_type")
    if model_type in PROCESSOR_MAPPING_NAMES:
        yield f"{model_type} is multi-modal"
    elif model_type not in CONFIG_MAPPING_NAMES:
        yield f"transformers does not know the model type {model_type!r}"


def _fetch_config_files(name: str, revision: str | None) -> Path | None:
    """A folder with the repository's telltale files and its config.json; None when it cannot be had."""
    if Path(name).exists():
        return Path(name)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    # The client lets errors of its HTTP library through, and has changed that library more than once. Their common
    # base is among the classes that its own error comes from.
    of_hub = (each for each in HfHubHTTPError.__mro__ if issubclass(each, Exception) and each is not Exception)
    unreachable: tuple[type[Exception], ...] = (OSError, ValueError, *of_hub)
    patterns = ["config.json", *(f"*{pattern}" for pattern in _VLLM_ONLY_FILES)]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except unreachable:  # offline, or no such repository: load_tokenizer meets the same next, and reports it
        pass
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def looks_like_path(name: str) -> bool:
    """Whether a model's name can't be one on the Hub (NAME or USER/NAME), nor a URL."""
    return name.startswith((".", "/", "~")) or (name.count("/") > 1 and "://" not in name)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
