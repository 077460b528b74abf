"""Look at an image's header before anything decodes it: what it is, how large, and whether it is a bomb."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from dpgen.data.media.parts import INVALID, TOO_LARGE
from dpgen.data.media.policy import MediaPolicy
from dpgen.errors import RowRefused

# Pillow runs other programs for these, or knows no more of them than their names (`open_image` of vLLM). IPTC may hold
# an image of any of these kinds, which Pillow opens.
_UNSAFE_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}


class ImageFacts(NamedTuple):
    """Hold what an image's header says.

    Attributes:
        format: Pillow's name: "PNG", "JPEG", ...
        width, height: in pixels.
    """

    format: str
    width: int
    height: int


@contextmanager
def limit_pixels(policy: MediaPolicy) -> Iterator[None]:
    """Let Pillow decode no image above `data.max_image_pixels` within the block, nor print a warning about one.

    An image may hold another one, larger than its own header says. Not for several threads at a time.
    """
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = policy.max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def check_image(data: bytes, policy: MediaPolicy, where: str = "the image") -> ImageFacts:
    """Return what an image's header says, after checking that it may be decoded. Nothing is decoded here.

    What is cut short or corrupt behind the header shows only when it is decoded: see `make_image_error`.

    Raises:
        RowRefused: `media_invalid`, it is no image; `media_too_large`, it has too many pixels.
    """
    from PIL import Image

    try:
        with limit_pixels(policy), Image.open(io.BytesIO(data), formats=_list_formats()) as image:
            facts = ImageFacts(image.format or "", *image.size)
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise anything on a broken header
        raise make_image_error(where, error, policy, data) from None
    if facts.width < 1 or facts.height < 1:
        raise RowRefused(INVALID, f"{where}: {facts.format} of {facts.width}x{facts.height} pixels")
    if facts.width * facts.height > policy.max_pixels:
        raise RowRefused(TOO_LARGE, f"{where}: {facts.width}x{facts.height} pixels, {_name_limit(policy)}")
    return facts


def make_image_error(where: str, error: Exception, policy: MediaPolicy, data: bytes = b"") -> RowRefused:
    """Return the error of a row whose image Pillow, or vLLM with Pillow, can't open or decode.

    Args:
        data: the image, of which the beginning may tell what it is instead.
    """
    from PIL import Image, UnidentifiedImageError

    causes = (error, error.__cause__, error.__context__)
    if any(isinstance(cause, Image.DecompressionBombError | Image.DecompressionBombWarning) for cause in causes):
        return RowRefused(TOO_LARGE, f"{where}: more pixels than allowed, {_name_limit(policy)}")
    if isinstance(error, UnidentifiedImageError):
        return RowRefused(INVALID, f"{where}: no image of a known format{_describe_beginning(data)}")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RowRefused(INVALID, f"{where}: the image can't be decoded: {reason}")


def _name_limit(policy: MediaPolicy) -> str:
    return f"data.max_image_pixels={policy.max_pixels}"


def _describe_beginning(data: bytes) -> str:
    if data[:64].lstrip()[:1] == b"<":
        return " (it begins as HTML or XML does)"
    if data.startswith(b"version https://git-lfs"):
        return " (a pointer of Git LFS: run `git lfs pull`)"
    return f" (it begins with {data[:8]!r})" if data else ""


@cache
def _list_formats() -> list[str]:
    """Return the formats that Pillow may open."""
    from PIL import Image

    Image.init()
    return sorted(set(Image.OPEN) - _UNSAFE_FORMATS)
