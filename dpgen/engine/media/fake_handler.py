"""Stand in for a model's processor of media: images are decoded with Pillow, and each becomes a few characters.

The characters follow from the contents alone. The fake engine checks that it gets the same contents.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from dpgen.data.media.images import check_image, limit_pixels, make_image_error
from dpgen.data.media.loading import load_media
from dpgen.data.media.parts import MediaPart, MediaText, find_media
from dpgen.data.media.policy import MediaPolicy
from dpgen.engine.fake_backend import FakeOptions, FakeTokenizer
from dpgen.engine.media.handling import HandleFn, PreparedPrompt, make_handler


def start(options: Mapping[str, Any]) -> tuple[HandleFn, None]:
    """Return the handler of a worker; see `WorkerSpec.factory`.

    Args:
        options: the fake engine's.
    """
    fields = FakeOptions(**options)

    def prepare(prompt: Any, policy: MediaPolicy) -> PreparedPrompt:
        time.sleep(fields.prepare_s)
        media, text = find_media(prompt), describe_prompt(prompt)
        if fields.prepare_crash_on is not None and fields.prepare_crash_on in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if fields.prepare_hang_on is not None and fields.prepare_hang_on in text:
            time.sleep(3600)
        contents = [_decode(part, policy) for part in media]
        marks = "".join(f"<{part.kind} {digest(content)}>" for part, content in zip(media, contents, strict=True))
        return PreparedPrompt(FakeTokenizer().encode(marks + text), [marks.encode(), *contents])

    return make_handler(prepare), None


def describe_prompt(prompt: Any) -> str:
    """Return the text of a prompt with media."""
    return prompt.text if isinstance(prompt, MediaText) else str(prompt["messages"])


def digest(content: bytes | memoryview) -> str:
    """Return what stands for a medium's contents."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _decode(part: MediaPart, policy: MediaPolicy) -> bytes:
    """Return an image's pixels, or the contents of another medium."""
    data = load_media(part, policy)
    if part.kind != "image":
        return data
    from PIL import Image

    check_image(data, policy, part.where)
    try:
        with limit_pixels(policy), Image.open(io.BytesIO(data)) as image:
            return f"{image.size}".encode() + image.convert("RGB").tobytes()
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise anything on a broken image
        raise make_image_error(part.where, error, policy, data) from None
