"""Prepare prompts with media in a worker of the rank: vLLM's own renderer and the model's processor, without the model.

- The calls are those of LLM.chat and LLM.generate, so token ids and pixels are theirs. One thing differs: the renderer
  loads media through `RowMediaConnector`, which says where a medium is and how large it may be.
- Processed media are cached as vLLM does; the workers divide `engine.mm_processor_cache_gb`.
- The renderer asks neither for a device nor for the layout of the engine: only the model, and what concerns prompts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dpgen.config.prompt import PromptConfig
from dpgen.data.media.images import check_image, limit_pixels, make_image_error
from dpgen.data.media.loading import load_media
from dpgen.data.media.parts import INVALID, MEDIA_TYPE, MediaPart, MediaText, find_media
from dpgen.data.media.policy import MediaPolicy
from dpgen.engine.media.handling import HandleFn, PreparedPrompt, make_handler
from dpgen.engine.messages import EngineSpec
from dpgen.errors import ConfigError, RowRefused

_CONNECTOR = "dpgen"  # vLLM's name of the connector; its URLs are dpgen:0, dpgen:1, ... of a prompt's media
_UNSUPPORTED = "unsupported_content"


def start(spec: EngineSpec, prompt: PromptConfig, num_workers: int) -> tuple[HandleFn, None]:
    """Return the handler of a worker; see `WorkerSpec.factory`.

    Args:
        spec: with options that concern prompts; see `_ENGINE_OPTIONS` of `dpgen.engine.starting.media_workers`.
        num_workers: that divide the cache.

    Raises:
        ConfigError: vLLM rejects the model, or can't load its processor.
    """
    os.environ["VLLM_MEDIA_CONNECTOR"] = _CONNECTOR
    return make_handler(VllmMediaProcessor(make_renderer(spec, num_workers), prompt).prepare), None


def make_renderer(spec: EngineSpec, num_workers: int = 1) -> Any:
    """Return vLLM's renderer for a model, with the processor of its media.

    Raises:
        ConfigError: vLLM rejects the model, or can't load its processor.
    """
    from vllm.renderers import renderer_from_config

    from dpgen.engine.vllm.adapters import VllmAdapters
    from dpgen.engine.vllm.engine_config import convert_types, create_engine_config
    from dpgen.engine.vllm.media.requirements import describe_processor_error

    options, _ = convert_types(spec.options)
    cache_gb = options.get("mm_processor_cache_gb", 4)
    options["mm_processor_cache_gb"] = cache_gb / num_workers
    alone = dataclasses.replace(
        spec, world=None, tensor_parallel_size=1, pipeline_parallel_size=1, enable_expert_parallel=False, adapters={}
    )
    config, _ = create_engine_config(alone, options, "uni", VllmAdapters({}))
    # Without both caches vLLM names media by number instead of by contents, and each worker counts for itself.
    config.cache_config.enable_prefix_caching = True
    try:
        return renderer_from_config(config)
    except Exception as error:
        raise ConfigError(describe_processor_error(spec.model, error)) from error


class VllmMediaProcessor:
    """Prepare prompts with media.

    Args:
        renderer: vLLM's.
        prompt: how rows become prompts.
    """

    def __init__(self, renderer: Any, prompt: PromptConfig) -> None:
        from dpgen.engine.vllm.media.connector import load_connector
        from dpgen.engine.vllm.vllm_render import VllmRenderer

        # The engine's cache does not know what this process has seen: media are sent whole.
        self._renderer = VllmRenderer(renderer, prompt, skip_mm_cache=True)
        self._connector = load_connector(renderer.model_config)
        self._policy = MediaPolicy()

    def prepare(self, prompt: Any, policy: MediaPolicy) -> PreparedPrompt:
        """Return a prompt's tokens, and what the engine needs of its media.

        Args:
            policy: what may be loaded.

        Raises:
            RowRefused: as of `VllmRenderer.render_input`; `media_...`, a medium can't be loaded; `unsupported_content`,
                the model does not take it.
        """
        from dpgen.engine.vllm.media.connector import RowMediaConnector
        from dpgen.engine.vllm.media.features import encode_features

        self._policy = policy
        os.environ["VLLM_MAX_IMAGE_PIXELS"] = str(policy.max_pixels)
        parts = find_media(prompt)
        with RowMediaConnector.serve(lambda number, decode: self._load(parts[number], decode)):
            try:
                rendered = self._renderer.render_input(self._convert(prompt))
            except RowRefused as error:
                raise _name_cause(error) from None
        return PreparedPrompt(rendered["prompt_token_ids"], encode_features(rendered))

    def _convert(self, prompt: Any) -> Any:
        """Return a prompt as vLLM takes it.

        Raises:
            RowRefused: a medium of a text can't be loaded.
        """
        if isinstance(prompt, MediaText):
            data: dict[str, list[Any]] = {}
            for number, part in enumerate(prompt.media):
                fetch = getattr(self._connector, f"fetch_{part.kind}")
                data.setdefault(part.kind, []).append(fetch(f"{_CONNECTOR}:{number}"))
            return {"prompt": prompt.text, "multi_modal_data": data}
        numbers = iter(range(len(find_media(prompt))))
        messages = [_convert_message(message, numbers) for message in prompt["messages"]]
        return {**prompt, "messages": messages}

    def _load(self, part: MediaPart, decode: Callable[[bytes], Any]) -> Any:
        """Return a medium as vLLM decodes it."""
        data = load_media(part, self._policy)
        if part.kind != "image":
            with _explain(part):
                return decode(data)
        check_image(data, self._policy, part.where)
        try:
            with limit_pixels(self._policy):
                return decode(data)
        except Exception as error:  # noqa: BLE001 - Pillow's readers raise anything on a broken image
            raise make_image_error(part.where, error, self._policy, data) from None


def _convert_message(message: Any, numbers: Iterator[int]) -> Any:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == MEDIA_TYPE:
            extras = {name: value for name, value in part.items() if name not in ("type", MEDIA_TYPE)}
            type = f"{part[MEDIA_TYPE].kind}_url"
            part = {**extras, "type": type, type: {"url": f"{_CONNECTOR}:{next(numbers)}"}}
        parts.append(part)
    return {**message, "content": parts}


@contextmanager
def _explain(part: MediaPart) -> Iterator[None]:
    """Turn what a decoder of audio or video raises into the row's error."""
    try:
        yield
    except ImportError as error:
        raise RowRefused(_UNSUPPORTED, f"{part.where}: decoding {part.kind} needs a package: {error}") from None
    except Exception as error:  # noqa: BLE001 - decoders raise anything on a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RowRefused(INVALID, f"{part.where}: the {part.kind} can't be decoded: {reason}") from None


def _name_cause(error: RowRefused) -> RowRefused:
    """Return the error of a row that vLLM's renderer rejects; of the model's doing unless a template has failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RowRefused) and cause is not error:
            return cause  # of the medium itself
        if type(cause).__module__.startswith("jinja2.") or type(cause).__name__ == "ChatTemplateResolutionError":
            return error
        cause = cause.__cause__
    if error.type not in ("chat_template_failed", "tokenizer_failed"):
        return error
    hint = " (engine.limit_mm_per_prompt)" if error.message.startswith("At most ") else ""
    return RowRefused(_UNSUPPORTED, f"the model does not take it: {error.message}{hint}")
