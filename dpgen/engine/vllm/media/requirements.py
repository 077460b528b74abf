"""Say what is missing for a model's processor of media."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from dpgen.engine.messages import EngineSpec
from dpgen.engine.vllm.rejections import summarize_error
from dpgen.errors import RowRefused
from dpgen.formatting import format_extra
from dpgen.records import Request

_HINTS = {
    "torchvision": "install torchvision's build for the installed torch (launch/install.sh --vision, or "
    f"{format_extra('vision')})",
}


def explain_failed_import(error: Exception) -> str | None:
    """Return why vLLM can't import a model's code, if a package is missing that may be the reason; None otherwise.

    vLLM imports it in a process of its own, and says only that this has failed.
    """
    missing = [package for package in _HINTS if find_spec(package) is None]
    if "failed to be inspected" not in str(error) or not missing:
        return None
    hints = "; ".join(
        f"{package} is not installed, which many models of images need: {_HINTS[package]}" for package in missing
    )
    return f"{summarize_error(error)} {hints}"


def describe_processor_error(model: str, error: Exception) -> str:
    """Return one line on why a model's processor can't be loaded, and what to install if a package is missing."""
    if (package := _find_missing_package(error)) is not None:
        return f"the processor of {model} needs {package}: {_HINTS[package]}"
    return f"vLLM can't load the processor of {model}, for images, audio or video: {summarize_error(error)}"


def find_missing_processor(spec: EngineSpec, model_config: Any) -> Iterator[str]:
    """Yield one line if the rows' media can't be processed with what is installed, or vLLM could not load the model.

    vLLM tries the processor when it loads a model that takes media, whatever the rows are, and says nothing of the
    package that it needs.

    Args:
        model_config: vLLM's `ModelConfig`.
    """
    if not _takes_media(model_config):
        if spec.takes_media:
            yield f"{spec.model} takes no images, audio or video, which data.*_column names: choose another model"
        return
    if not spec.takes_media and model_config.multimodal_config.skip_mm_profiling:
        return
    from vllm.multimodal import MULTIMODAL_REGISTRY

    try:
        MULTIMODAL_REGISTRY.create_processor(model_config).info.get_hf_processor()
    except Exception as error:  # noqa: BLE001 - processors are foreign code
        reason = describe_processor_error(spec.model, error)
        if spec.takes_media:
            yield reason
        elif _find_missing_package(error) is not None:  # another reason may not hold for vLLM, which calls it otherwise
            yield f"{reason}; for rows of texts alone, engine.language_model_only=true does without"


def _takes_media(model_config: Any) -> bool:
    """Return True for a model that takes images, audio or video, unless the configuration leaves out all of them."""
    if hasattr(model_config, "supports_multimodal_inputs"):  # from vLLM 0.31 on
        return bool(model_config.supports_multimodal_inputs)
    from vllm.multimodal import MULTIMODAL_REGISTRY

    registry: Any = MULTIMODAL_REGISTRY
    return bool(registry.supports_multimodal_inputs(model_config))


def _find_missing_package(error: Exception) -> str | None:
    text = f"{error} {error.__cause__ or ''}".lower()
    return next((package for package in _HINTS if package in text), None)


def require_media(request: Request, model_config: Any) -> None:
    """Raise RowRefused (`unsupported_content`) for a row without media if the model's encoder reads nothing else.

    vLLM generates from whatever its memory holds then (seen in 0.32).

    Args:
        model_config: vLLM's `ModelConfig`.
    """
    if model_config.is_encoder_decoder and request.media is None:
        reason = "the model's encoder reads audio, images or video, and the row has none"
        raise RowRefused("unsupported_content", reason)
