"""Test that images are looked at before they are decoded: what they are, how large, and no bombs."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import pytest
from PIL import Image

from dpgen.data.media.images import ImageFacts, check_image, limit_pixels, make_image_error
from dpgen.data.media.looking import look_at
from dpgen.data.media.parts import MediaPart
from dpgen.data.media.policy import MediaPolicy
from dpgen.errors import RowRefused

POLICY = MediaPolicy()


def encode(format: str, mode: str = "RGB", size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, format, **options)
    return stream.getvalue()


def make_png_header(width: int, height: int) -> bytes:
    """Return a PNG of which only the header is there, as a bomb's would be."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def reject(data: bytes, policy: MediaPolicy = POLICY) -> tuple[str, str]:
    with pytest.raises(RowRefused) as raised:
        check_image(data, policy, "images")
    return raised.value.type, raised.value.message


def rotate() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode("JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (encode("PNG"), "PNG"),
        (encode("PNG", "P"), "PNG"),
        (encode("PNG", "I;16"), "PNG"),
        (encode("PNG", "LA"), "PNG"),
        (encode("PNG", "1"), "PNG"),
        (encode("JPEG"), "JPEG"),
        (encode("JPEG", "CMYK"), "JPEG"),
        (encode("JPEG", "L"), "JPEG"),
        (rotate(), "JPEG"),
        (encode("WEBP"), "WEBP"),
        (encode("GIF", "P"), "GIF"),
        (encode("TIFF"), "TIFF"),
        (encode("BMP"), "BMP"),
        (encode("PPM"), "PPM"),
    ],
)
def test_images_of_every_usual_kind_pass(data: bytes, format: str) -> None:
    assert check_image(data, POLICY) == ImageFacts(format, 8, 6)


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 1), (30_000, 6_000)])
def test_a_bomb_is_rejected_by_its_header_and_nothing_is_printed(
    size: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        type, message = reject(make_png_header(*size))
    assert type == "media_too_large"
    assert "data.max_image_pixels=178956970" in message
    assert not warned
    assert capfd.readouterr().err == ""


def test_the_limit_is_the_configurations_not_pillows() -> None:
    before = Image.MAX_IMAGE_PIXELS
    large = make_png_header(20_000, 20_000)
    assert check_image(large, MediaPolicy(max_pixels=400_000_000)).width == 20_000
    assert reject(large, MediaPolicy(max_pixels=399_999_999))[0] == "media_too_large"
    assert reject(encode("PNG"), MediaPolicy(max_pixels=47)) == (
        "media_too_large",
        "images: more pixels than allowed, data.max_image_pixels=47",
    )
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello, I am a text", "it begins with b'hello, I'"),
        (b"<!DOCTYPE html><html>404</html>", "it begins as HTML or XML does"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it begins as HTML or XML does"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n", ""),
        (encode("PNG")[:20], ""),
        (encode("JPEG")[:10], ""),
        (b"RIFF\0\0\0\0WAVEfmt ", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n", "no image"),
        (b"\0" * 100, ""),
        # An image of IPTC that holds one of PostScript, which Pillow would give to Ghostscript.
        (
            b"\x1c\x03\x3c\0\x02\x01\0\x1c\x03\x14\0\x02\0\x40\x1c\x03\x1e\0\x02\0\x40\x1c\x03\x78\0\x01\x05"
            b"\x1c\x08\x0a\0\x31%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%E",
            "no image",
        ),
    ],
)
def test_what_is_no_image_is_rejected(data: bytes, words: str) -> None:
    type, message = reject(data)
    assert type == "media_invalid"
    assert words in message
    assert message.startswith("images: ")
    assert len(message) < 200


def test_what_is_cut_short_becomes_an_error_when_it_is_decoded() -> None:
    for format in ("PNG", "JPEG", "PPM", "BMP"):
        stream = io.BytesIO()
        Image.effect_noise((200, 200), 50).convert("RGB").save(stream, format)
        data = stream.getvalue()[: -len(stream.getvalue()) // 4]
        check_image(data, POLICY)
        with pytest.raises(OSError) as raised, limit_pixels(POLICY):
            Image.open(io.BytesIO(data)).load()
        error = make_image_error("images", raised.value, POLICY)
        assert error.type == "media_invalid"
        assert error.message.startswith("images: the image can't be decoded: ")


def test_an_image_inside_an_image_is_measured_too() -> None:
    inner = make_png_header(20_000, 20_000)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + entry + inner
    assert reject(icon)[0] == "media_too_large"


def test_a_person_sees_what_an_image_is() -> None:
    data = encode("PNG", size=(640, 480))
    assert look_at(MediaPart("image", "i", data), POLICY) == f"<image 640x480 PNG, {len(data)} bytes>"
    assert look_at(MediaPart("audio", "a", b"RIFF"), POLICY) == "<audio, 4 bytes>"
    url = MediaPart("image", "i", source="https://example.com/a.png")
    assert look_at(url, POLICY) == "<image https://example.com/a.png>", "a preview fetches nothing"
    with pytest.raises(RowRefused):
        look_at(MediaPart("image", "i", b"x"), POLICY)
