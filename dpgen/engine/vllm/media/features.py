"""Turn what vLLM's processor makes of media into the parts of a buffer, and back: both ends of the shared memory.

- The form is vLLM's own, `MultiModalFeatureSpec` in its msgpack encoding, as vLLM sends it between its processes.
- Reading copies no tensor: they are views of the mapped memory, which lives as long as one of them.
- The hash of a medium is of its contents: vLLM caches prefixes and encoder outputs by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItems
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from dpgen.distributed.network import raise_open_file_limit
from dpgen.engine.media.buffers import Buffer
from dpgen.records import Request

_MAX_MAPPED = 1 << 16  # requests in the engine: each holds an open file
_INLINE_BYTES = 256  # smaller tensors are in the first part


def encode_features(rendered: Any) -> Sequence[Buffer]:
    """Return what the engine needs of a prompt's media.

    Args:
        rendered: vLLM's input for the engine; of a prompt without media there is nothing.
    """
    features = []
    for modality, positions in rendered.get("mm_placeholders", {}).items():
        for index, position in enumerate(positions):
            name = rendered["mm_hashes"][modality][index]
            item = rendered["mm_kwargs"][modality][index]
            features.append(MultiModalFeatureSpec(item, modality, name, position, name))
    parts: Any = MsgpackEncoder(_INLINE_BYTES).encode(features)
    return list[Buffer](parts)


def make_engine_prompt(request: Request, token_ids: list[int]) -> Any:
    """Return a request's prompt as vLLM's engine takes it.

    Args:
        token_ids: of the prompt, those that stand for media included.
    """
    if request.media is None:
        return tokens_input(token_ids)
    features: list[MultiModalFeatureSpec] = MsgpackDecoder(list[MultiModalFeatureSpec]).decode(request.media.read())
    items: dict[str, list[Any]] = {}
    hashes: dict[str, list[str]] = {}
    positions: dict[str, list[Any]] = {}
    for feature in features:
        items.setdefault(feature.modality, []).append(feature.data)
        hashes.setdefault(feature.modality, []).append(feature.identifier)
        positions.setdefault(feature.modality, []).append(feature.mm_position)
    return mm_input(token_ids, MultiModalKwargsItems(items), hashes, positions)


def send_media_whole(config: Any) -> None:
    """Turn off vLLM's cache of processed media in the engine: workers send all of them, and mapped memory is no copy.

    Args:
        config: vLLM's `VllmConfig`.
    """
    if (multimodal := config.model_config.multimodal_config) is not None:
        multimodal.mm_processor_cache_gb = 0
        raise_open_file_limit(_MAX_MAPPED)
