"""Find the tokenizer that vLLM would use for a model, decide if transformers gives the same tokens, and load it.

- Follows vLLM 0.32: `vllm/config/model.py` (defaults, an architecture's mode), `vllm/tokenizers/registry.py` and
  `hf.py` (mode "auto", loading), `vllm/renderers/base.py` (tokenization of multi-modal models).
- In doubt, the answer is "not the same": vLLM then renders the rows in the engine process. This takes time from the
  model, but is right by construction.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpgen.data.hub import explain_hub_error, find_broken_file
from dpgen.errors import ConfigError
from dpgen.imports import imports_without_gc

logger = logging.getLogger(__name__)

# Files that make vLLM tokenize, or choose a chat template, by rules that transformers' tokenizer does not have.
_VLLM_ONLY_FILES = {
    "tekken.json": "it has a Mistral tokenizer",
    "tokenizer.model.v*": "it has a Mistral tokenizer",
    "processor_config.json": "it has a multi-modal processor",
    "preprocessor_config.json": "it has a multi-modal processor",
    "chat_template.json": "its processor has a chat template of its own",
}
# Files of sentence-transformers, which may tell vLLM to lower a text's case.
_SENTENCE_FILES = "sentence_*_config.json"
# The end of architectures that only put another head on a model, as engine.hf_overrides does for rerankers.
_HEAD = "ForSequenceClassification"
# Architectures for which "auto" means a tokenizer mode that only vLLM has.
_VLLM_ONLY_ARCHITECTURES = ("MoonshotKimia", "KimiK3", "DeepseekV32", "DeepseekV4", "Inkling")
# Engine options that change how prompts are rendered, each with the test for a value that does.
_VLLM_ONLY_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "enable_prompt_embeds": bool,
    "hf_config_path": bool,
    "hf_overrides": lambda value: callable(value) or "model_type" in (value or ()) or _has_other_tokenizer(value or {}),
    "model_impl": lambda value: value == "terratorch",
    "config_format": lambda value: value == "mistral",
}
# Environment variables that make vLLM load the tokenizer from another place, or use another implementation.
_VLLM_ONLY_VARIABLES = ("VLLM_USE_MODELSCOPE", "VLLM_MODEL_REDIRECT_PATH", "VLLM_USE_FASTOKENS")


@dataclass(frozen=True)
class TokenizerConfig:
    """Name the tokenizer of a model, and all that decides how it is loaded.

    Attributes:
        name: a directory, or a repository on the Hugging Face Hub.
        revision: of that repository; None for the default branch.
        trust_remote_code: True if code of that repository may run.
        tokenizer_mode: vLLM's option in lower case: "auto", "hf", "mistral", ...
        model: the model, whose configuration decides what "auto" means; None if that is `name`.
        model_revision: of the model's repository.
        engine_reason: the reason why an engine option makes vLLM render; None if there is no such option.
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
        """Return the tokenizer that vLLM would use for a model and engine options.

        Args:
            model: `EngineArgs.model`.
            engine: other fields of `EngineArgs`; only those that concern the tokenizer are read.
        """
        revision = engine.get("revision")
        name, tokenizer_revision = engine.get("tokenizer"), engine.get("tokenizer_revision")
        option = next((key for key, matters in _VLLM_ONLY_OPTIONS.items() if matters(engine.get(key))), None)
        return cls(
            name=model if name is None else str(name),
            # As in vLLM, the model's revision is the default even for a tokenizer of another repository.
            revision=revision if tokenizer_revision is None else tokenizer_revision,
            trust_remote_code=bool(engine.get("trust_remote_code", False)),
            tokenizer_mode=str(engine.get("tokenizer_mode") or "auto").lower(),
            model=model,
            model_revision=revision,
            engine_reason=None if option is None else f"the engine option {option} changes how vLLM renders",
        )


def is_supported_by_transformers(config: TokenizerConfig) -> bool:
    """Return True if transformers gives the tokens that vLLM would; see `find_reason_to_tokenize_in_engine`."""
    return find_reason_to_tokenize_in_engine(config) is None


def find_reason_to_tokenize_in_engine(config: TokenizerConfig) -> str | None:
    """Return why vLLM itself must render the prompts, as a clause for the log; None if transformers can.

    Reads a few small files of the model's and the tokenizer's repositories, and ignores files that can't be read:
    `load_tokenizer` then reports why.
    """
    if config.engine_reason is not None:
        return config.engine_reason
    for variable in _VLLM_ONLY_VARIABLES:
        if os.environ.get(variable, "").strip().lower() not in ("", "0", "false"):
            return f"{variable} is set"
    if config.tokenizer_mode not in ("auto", "hf"):
        return f"tokenizer_mode={config.tokenizer_mode} is vLLM's own"
    if "://" in config.name or Path(config.name).is_file():
        return f"{config.name} is neither a directory nor a repository"
    repositories = {(config.name, config.revision)}
    if config.model is not None:
        repositories.add((config.model, config.model_revision))
    for name, revision in sorted(repositories, key=str):
        for reason in _iter_reasons(name, revision):
            return f"{name}: {reason}"
    return None


def load_tokenizer(config: TokenizerConfig) -> Any:
    """Load the transformers tokenizer as vLLM loads it.

    Returns:
        A `transformers.PreTrainedTokenizerBase`.

    Raises:
        ConfigError: it is missing, or can't be loaded.
    """
    if looks_like_path(config.name) and not Path(config.name).exists():
        raise ConfigError(f"no tokenizer at {config.name}: there is no such directory")
    with imports_without_gc():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.name,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            truncation_side="left",
        )
    # A repository's code may raise anything, and a broken tokenizer.json raises a plain Exception.
    except Exception as error:
        reason = find_broken_file(Path(config.name)) or explain_hub_error(config.name, error) or _first_line(error)
        raise ConfigError(f"cannot load the tokenizer of {config.name}: {reason}") from error
    # Silences a warning about long prompts: the engine rejects them, by the limit that counts.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def make_encoder(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    """Return what gives a text's tokens as a tokenizer of transformers does: (text, adds special tokens) → ids.

    What transformers 5 does around the tokenizers library, for batches and masks, takes as long as the tokens of a
    short text. It is left out where the tokenizer's class is plain and nothing cuts or pads texts.
    """

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    try:
        from transformers import PreTrainedTokenizerBase, TokenizersBackend
    except ImportError:  # transformers 4
        return encode
    kind = type(tokenizer)
    is_plain = isinstance(tokenizer, TokenizersBackend) and not hasattr(tokenizer, "_switch_to_input_mode")
    if not is_plain or kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return encode
    if kind._encode_plus is not TokenizersBackend._encode_plus:
        return encode
    backend = tokenizer._tokenizer

    def encode_plainly(text: str, add_special_tokens: bool) -> list[int]:
        is_set = backend.encode_special_tokens == tokenizer.split_special_tokens
        if not is_set or backend.truncation is not None or backend.padding is not None:
            return encode(text, add_special_tokens)  # which sets all three as they should be
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    return encode_plainly


def looks_like_path(name: str) -> bool:
    """Return True if a model's name is neither a name on the Hub (NAME or USER/NAME) nor a URL."""
    return name.startswith((".", "/", "~")) or (name.count("/") > 1 and "://" not in name)


def _has_other_tokenizer(overrides: Mapping[str, Any]) -> bool:
    """Return True if other architectures may mean another tokenizer mode."""
    return any(not str(name).endswith(_HEAD) for name in overrides.get("architectures") or ())


def _iter_reasons(name: str, revision: str | None) -> Iterator[str]:
    directory = fetch_config_files(name, revision)
    if directory is None:
        return
    for pattern, reason in _VLLM_ONLY_FILES.items():
        # At any depth, as vLLM looks for Mistral's files.
        if next(directory.rglob(pattern), None) is not None:
            yield reason
    for path in directory.rglob(_SENTENCE_FILES):
        if (_read_model_config(path) or {}).get("do_lower_case"):
            yield "it has sentence-transformers settings (do_lower_case)"
    yield from _iter_reasons_in_config(_read_model_config(directory / "config.json"))


def _iter_reasons_in_config(config: Mapping[str, Any] | None) -> Iterator[str]:
    # Both names have moved within transformers; these modules have always had them.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    if config is None:
        return
    for architecture in config.get("architectures") or ():
        if str(architecture).startswith(_VLLM_ONLY_ARCHITECTURES):
            yield f"vLLM has a tokenizer mode of its own for {architecture}"
    if config.get("speculators_config") is not None:
        yield "it is a speculator, which vLLM replaces by its target model"
    model_type = config.get("model_type")
    if model_type in PROCESSOR_MAPPING_NAMES:
        yield f"{model_type} is multi-modal"
    elif model_type not in CONFIG_MAPPING_NAMES:
        yield f"transformers does not know the model type {model_type!r}"


def _read_model_config(path: Path) -> dict[str, Any] | None:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None  # a tokenizer alone needs no config.json
    except (OSError, ValueError) as error:
        logger.debug(f"ignored {path} when choosing a tokenizer: {_first_line(error)}")
        return None
    return config if isinstance(config, dict) else None


def fetch_config_files(name: str, revision: str | None) -> Path | None:
    """Return a directory with the repository's config.json and vLLM-only files; None if they can't be fetched."""
    if Path(name).exists():
        return Path(name)
    return _download_config_files(name, revision) or _find_cached_config(name, revision)


def _download_config_files(name: str, revision: str | None) -> Path | None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    # The client passes on errors of its HTTP library, and has changed that library more than once. The common base
    # class of these errors is among the base classes of the client's own error.
    of_http = [base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base is not Exception]
    unreachable: tuple[type[Exception], ...] = (OSError, ValueError, *of_http)
    patterns = ["config.json", *(f"*{pattern}" for pattern in (*_VLLM_ONLY_FILES, _SENTENCE_FILES))]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except unreachable as error:  # offline, or no such repository: load_tokenizer fails next, and reports it
        logger.debug(f"can't download the configuration of {name}: {_first_line(error)}")
        return None


def _find_cached_config(name: str, revision: str | None) -> Path | None:
    import huggingface_hub

    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError as error:
        logger.debug(f"{name} is not the name of a repository: {_first_line(error)}")
        return None
    return Path(config).parent if isinstance(config, str) else None


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
