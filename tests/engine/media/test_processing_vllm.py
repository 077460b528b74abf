"""Prompts with images in a worker, with vLLM's own renderer and without an engine: what is rejected, and how."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import save_tiny_model
from helpers.tiny_vision import ENGINE, make_image, save_tiny_vision

from dpgen.config.prompt import PromptConfig
from dpgen.data.media.parts import MediaPart, MediaText
from dpgen.data.media.policy import MediaPolicy
from dpgen.engine.media.buffers import MediaBuffer
from dpgen.engine.media.handling import PreparedAnswer, encode_prompt
from dpgen.engine.messages import EngineSpec
from dpgen.errors import ConfigError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

Handle = Callable[[Any], Any]


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[[Path], Handle]]:
    from dpgen.engine.vllm.media import processing

    before = dict(os.environ)

    def start(model: Path) -> Handle:
        prompt = PromptConfig(messages_column="messages")
        handle, _ = processing.start(EngineSpec("vllm", str(model), dict(ENGINE)), prompt, 2)

        def answer(prompt: Any) -> Any:
            buffer = MediaBuffer()
            buffer.write(encode_prompt(prompt, MediaPolicy()))
            return handle(buffer.address)

        return answer

    yield start
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def handle(start: Callable[[Path], Handle], tmp_path_factory: pytest.TempPathFactory) -> Handle:
    return start(save_tiny_vision(tmp_path_factory.mktemp("model")))


def make_chat(*images: bytes, text: str = "what is it?", kind: Any = "image") -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "media", "media": MediaPart(kind, "image", image)} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    own = {"template_kwargs": {}, "is_continued": False, "add_generation_prompt": True, "add_special_tokens": False}
    return {"messages": messages, **own}


def make_text(text: str, image: bytes) -> MediaText:
    return MediaText(text, (MediaPart("image", "image", image),))


@pytest.mark.parametrize(
    ("prompt", "error_type", "message"),
    [
        (make_chat(b"broken"), "media_invalid", "image: no image of a known format"),
        (make_chat(make_image(1)[:100]), "media_invalid", "image: the image can't be decoded"),
        (make_text("<image> what", b"broken"), "media_invalid", "image: no image of a known format"),
        (make_chat(*[make_image(1)] * 4), "unsupported_content", "At most 3 image(s)"),
        (make_chat(b"no video", kind="video"), "media_invalid", "image: the video can't be decoded"),
        (make_text("no mark", make_image(1)), "unsupported_content", "the model does not take it"),
        (make_chat(make_image(1), text="what " * 600), "prompt_too_long", "512"),
    ],
)
def test_what_the_model_can_t_take_is_a_typed_error(handle: Handle, prompt: Any, error_type: str, message: str) -> None:
    answer = handle(prompt)
    assert answer.type == error_type, answer
    assert message in answer.message


def test_a_text_with_marks_takes_images_and_the_worker_goes_on_after_errors(handle: Handle) -> None:
    for prompt in (make_text("<image> what", make_image(1)), make_chat(make_image(1), make_image(2))):
        assert isinstance(handle(prompt), PreparedAnswer)


def test_a_model_of_texts_alone_takes_no_image(start: Callable[[Path], Handle], tmp_path: Path) -> None:
    answer = start(save_tiny_model(tmp_path / "model", "plain", 512))(make_chat(make_image(1)))
    assert answer.type == "unsupported_content", answer


def test_a_request_may_not_cut_a_prompt_with_images(tmp_path: Path) -> None:
    """vLLM's server cuts before an image becomes many tokens, whose places would be wrong here."""
    from transformers import AutoTokenizer
    from vllm.config import ModelConfig

    from dpgen.data.openai_batch.lines import CHAT_URL
    from dpgen.engine.vllm.server_requests import RequestConverter
    from dpgen.errors import RowRefused
    from dpgen.records import Request, RequestId, ServerRequest

    model = str(save_tiny_model(tmp_path / "model", "plain", 512))
    converter = RequestConverter(ModelConfig(model=model), AutoTokenizer.from_pretrained(model), {})
    cuts = ServerRequest(CHAT_URL, {"model": model, "truncate_prompt_tokens": 2})
    tokens = [5, 6, 7]
    assert converter.convert(Request(RequestId(0), tokens, server_request=cuts), tokens).token_ids == [5, 6]
    with pytest.raises(RowRefused, match="would cut a prompt with images") as refused:
        converter.convert(Request(RequestId(0), tokens, server_request=cuts, media=MediaBuffer()), tokens)
    assert refused.value.type == "unsupported_request"


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_model_whose_code_needs_torchvision_says_what_to_install(tmp_path: Path) -> None:
    from dpgen.engine.vllm.vllm_backend import VllmBackend

    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": {"model_type": "llama"}}))
    with pytest.raises(ConfigError, match=r"torchvision is not installed.*launch/install\.sh --vision"):
        VllmBackend(EngineSpec("vllm", str(tmp_path), {"dtype": "float32"})).check_options()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("takes_media", [True, False])
def test_a_processor_that_needs_torchvision_is_refused_before_the_model_loads(
    takes_media: bool, tmp_path: Path
) -> None:
    """Also where no row may have media: vLLM tries the processor when it loads the model, unless told not to."""
    from dpgen.engine.vllm.vllm_backend import VllmBackend

    model = save_tiny_vision(tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        text = (model / name).read_text()
        (model / name).write_text(text.replace("Idefics3ImageProcessor", "Llama4ImageProcessor"))
    spec = EngineSpec("vllm", str(model), dict(ENGINE), takes_media=takes_media)
    with pytest.raises(ConfigError, match=r"needs torchvision: install .*--vision") as refused:
        VllmBackend(spec).check_options()
    assert ("engine.language_model_only=true" in str(refused.value)) == (not takes_media)
    if not takes_media:
        alone = replace(spec, options={**ENGINE, "language_model_only": True})
        VllmBackend(alone).check_options()
