"""Test which parts of messages hold media, and how columns fill their placeholders."""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any

import pytest

from dpgen.config.pooling.pooling_config import PoolingConfig
from dpgen.config.prompt import CALL_COLUMN, PromptConfig
from dpgen.data.media.parts import MediaPart, MediaText, find_media
from dpgen.data.prompts.chat import validate_messages
from dpgen.data.prompts.columns import check_prompt_columns, select_prompt_columns
from dpgen.data.prompts.pooling import wrap_untokenized
from dpgen.data.prompts.render import PromptRenderer, RenderedPrompt, make_prompt_text_fn
from dpgen.errors import ConfigError, RowRefused
from dpgen.programs.handle import ModelCall

PNG = b"\x89PNG..."
BASE64 = base64.b64encode(PNG).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"


def make_user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def build(row: dict[str, Any], **keys: Any) -> Any:
    return PromptRenderer(PromptConfig(**keys), None).build_prompt(row)


def reject(row: dict[str, Any], **keys: Any) -> tuple[str, str]:
    with pytest.raises(RowRefused) as raised:
        build(row, **keys)
    return raised.value.type, raised.value.message


def show(prompt: Any) -> list[str]:
    """Return the media of a prompt, each as its kind and where it is."""
    return [f"{part.kind} {part.source or ''}{part.data or ''}" for part in find_media(prompt)]


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, "image a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "image a.png"),
        ({"image_url": {"url": "a.png"}}, "image a.png"),
        ({"type": "input_image", "image_url": DATA_URL, "detail": "auto"}, f"image {DATA_URL}"),
        ({"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}, "audio data:audio/wav;base64,UklG"),
        ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, "audio a.wav"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "video a.mp4"),
        ({"type": "image", "image": {"bytes": PNG, "path": None}}, f"image {PNG!r}"),
        ({"type": "image", "image": {"bytes": PNG, "path": "a.png"}}, f"image a.png{PNG!r}"),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "image a.png"),
        ({"type": "image", "image": PNG}, f"image {PNG!r}"),
        ({"type": "image", "image": "a.png", "text": None}, "image a.png"),
        ({"type": "image", "url": "https://x.org/a.png"}, "image https://x.org/a.png"),
        ({"type": "image", "path": "a.png", "url": None}, "image a.png"),
        ({"type": "image", "base64": BASE64}, f"image data:;base64,{BASE64}"),
        ({"type": "audio", "audio": "a.wav"}, "audio a.wav"),
        ({"type": "video", "path": "a.mp4"}, "video a.mp4"),
    ],
)
def test_media_in_messages_are_found_in_every_form(part: dict[str, Any], shown: str) -> None:
    prompt = build({"m": make_user(part, {"type": "text", "text": "What?"})}, messages_column="m")
    assert show(prompt) == [shown]
    assert prompt["messages"][0]["content"][0]["type"] == "media"
    assert prompt["messages"][0]["content"][1] == {"type": "text", "text": "What?"}
    assert find_media(prompt)[0].where == "message 0, part 0"
    assert find_media(pickle.loads(pickle.dumps(prompt))) == find_media(prompt), "it travels to workers"


def test_keys_for_the_chat_template_stay_beside_a_medium_and_the_row_is_not_changed() -> None:
    part = {"type": "image", "image": "a.png", "min_pixels": 4, "cache_control": {"type": "ephemeral"}}
    messages = make_user(part)
    (message,) = validate_messages(messages)
    assert message["content"][0].keys() == {"type", "media", "min_pixels", "cache_control"}
    assert messages == make_user(part)


@pytest.mark.parametrize(
    ("part", "type", "words"),
    [
        ({"type": "image_url"}, "wrong_type", "no 'image_url'"),
        ({"type": "image_url", "image_url": {"detail": "low"}}, "wrong_type", "no 'url' that is a string"),
        ({"type": "image_url", "image_url": 7}, "wrong_type", "an int"),
        ({"type": "image", "image": "a", "url": "b"}, "wrong_type", "'image' and 'url' are set"),
        ({"type": "image", "image": {"height": 5}}, "wrong_type", "the keys height"),
        ({"type": "image", "image": [1, 2]}, "wrong_type", "a list"),
        ({"type": "image", "base64": PNG}, "wrong_type", "'base64' is a bytes"),
        ({"type": "image", "index": -1}, "wrong_type", "'index' is -1"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "wrong_type", "no 'data'"),
        ({"type": "image_embeds", "image_embeds": "x"}, "unsupported_content", "neither text nor an image"),
        ({"type": "image_url", "image_url": {"url": "a"}, "uuid": "1"}, "unsupported_content", "with a uuid"),
    ],
)
def test_media_in_messages_that_are_none_are_rejected(part: dict[str, Any], type: str, words: str) -> None:
    found, message = reject({"m": make_user(part)}, messages_column="m")
    assert found == type
    assert words in message
    assert message.startswith("message 0, part 0")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, []),
        ("", []),
        ([], []),
        ("a.png", ["image a.png"]),
        (PNG, [f"image {PNG!r}"]),
        (bytearray(PNG), [f"image {PNG!r}"]),
        ({"bytes": None, "path": None}, []),
        ({"bytes": None, "path": "a.png"}, ["image a.png"]),
        (["a.png", None, {"bytes": PNG, "path": None}], ["image a.png", f"image {PNG!r}"]),
    ],
)
def test_a_column_holds_one_medium_or_several_or_none(value: Any, shown: list[str]) -> None:
    chat = build({"p": "What?", "images": value}, prompt_column="p", as_chat=True, images_column="images")
    assert show(chat) == shown
    text = build({"p": "<image> What?", "images": value}, prompt_column="p", images_column="images")
    assert text == (MediaText("<image> What?", tuple(find_media(chat))) if shown else "<image> What?")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "images is an int, neither image bytes nor a path or URL"),
        ([["a.png"]], "images, item 0 is a list"),
        ({"array": [0.5], "sampling_rate": 8000}, "cast the column to its feature"),
        ({"bytes": "text", "path": None}, "images: its bytes are a str"),
    ],
)
def test_a_column_with_other_values_is_an_error(value: Any, words: str) -> None:
    type, message = reject({"p": "x", "images": value}, prompt_column="p", images_column="images")
    assert type == "wrong_type"
    assert words in message


def test_placeholders_are_filled_in_order_or_by_their_index() -> None:
    keys = {"messages_column": "m", "images_column": ["first", "more"], "audios_column": "sound"}
    row = {"first": "0.png", "more": ["1.png", "2.png"], "sound": "a.wav"}
    image, audio = {"type": "image", "text": None}, {"type": "audio"}
    chat = build({**row, "m": make_user(audio, image, "and", image, image)}, **keys)
    assert show(chat) == ["audio a.wav", "image 0.png", "image 1.png", "image 2.png"]
    by_index = [{"type": "image", "index": index} for index in (2, 0, 1, 0)]
    chat = build({**row, "m": make_user(*by_index, audio)}, **keys)
    assert show(chat)[:4] == ["image 2.png", "image 0.png", "image 1.png", "image 0.png"]
    mixed = make_user(image, {"type": "image", "image": "own.png"}, image, image)
    assert show(build({**row, "m": mixed}, **keys)) == [
        "audio a.wav",
        *("image 0.png", "image own.png", "image 1.png", "image 2.png"),
    ]


def test_media_without_placeholders_come_before_the_first_users_text() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?"},
        {"role": "user", "content": "And?"},
    ]
    keys = {"messages_column": "m", "images_column": "i", "videos_column": "v", "audios_column": "a"}
    chat = build({"m": messages, "i": ["0.png", "1.png"], "v": "0.mp4", "a": "0.wav"}, **keys)
    _, first, second = chat["messages"]
    assert [part.get("media", part.get("text")) for part in first["content"]] == [
        MediaPart("image", "i, item 0", source="0.png"),
        MediaPart("image", "i, item 1", source="1.png"),
        MediaPart("audio", "a", source="0.wav"),
        MediaPart("video", "v", source="0.mp4"),
        "What?",
    ]
    assert second["content"] == "And?"


@pytest.mark.parametrize(
    ("content", "images", "words"),
    [
        ([{"type": "image"}], ["0.png", "1.png"], "1 placeholder for image parts, and i 2 values"),
        ([{"type": "image"}] * 2, ["0.png"], "2 placeholders for image parts, and i 1 value"),
        ([{"type": "image"}], None, "1 placeholder for image parts, and i 0 values"),
        ([{"type": "image", "index": 1}], ["0.png"], "1 placeholder"),
        ([{"type": "audio"}], "0.png", "message 0, part 0 has no audio: put it there, or set data.audios_column"),
    ],
)
def test_as_many_placeholders_as_media_or_the_row_is_an_error(content: Any, images: Any, words: str) -> None:
    type, message = reject({"m": make_user(*content), "i": images}, messages_column="m", images_column="i")
    assert type == "media_mismatch"
    assert words in message


def test_a_chat_without_a_users_message_has_no_place_for_an_image() -> None:
    row = {"m": [{"role": "system", "content": "x"}], "i": "0.png"}
    assert reject(row, messages_column="m", images_column="i") == (
        "media_mismatch",
        "there is no user message to put i into",
    )


def test_rows_with_media_are_left_to_workers_and_others_stay_tokens() -> None:
    tokenizer = type("T", (), {"__call__": lambda *_, **__: {"input_ids": [1, 2]}, "__len__": lambda _: 9})()
    tokenizer.get_vocab = dict
    renderer = PromptRenderer(PromptConfig(prompt_column="p", images_column="i"), tokenizer)
    assert renderer.render({"p": "x", "i": None}).token_ids == [1, 2]
    rendered = renderer.render({"p": "x", "i": "0.png"})
    assert rendered.token_ids is None
    assert rendered.prompt == MediaText("x", (MediaPart("image", "i", source="0.png"),))


def test_a_batch_files_line_and_a_programs_call_take_media_in_messages() -> None:
    messages = make_user({"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": "What?"})
    body = {"messages": messages, "max_tokens": 5}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    assert show(build({"request": line}, request_column="request")) == [f"image {DATA_URL}"]
    call = ModelCall("chat", make_user({"type": "image", "image": {"bytes": PNG, "path": None}}), True)
    assert show(build({CALL_COLUMN: call}, call_column=CALL_COLUMN)) == [f"image {PNG!r}"]


def test_what_reads_texts_alone_rejects_media() -> None:
    prompt = build({"m": make_user({"type": "image", "image": "a.png"})}, messages_column="m")
    renderer = PromptRenderer(PromptConfig(messages_column="m", completion_column="c"), None)
    with pytest.raises(RowRefused, match="image needs task=generate") as raised:
        renderer.tokenize(prompt)
    assert raised.value.type == "unsupported_content"
    with pytest.raises(RowRefused, match="text after image can't be scored"):
        renderer.render({"m": make_user({"type": "image", "image": "a.png"}), "c": "yes"})
    with pytest.raises(RowRefused, match="image needs task=generate"):
        wrap_untokenized(RenderedPrompt(None, prompt), PoolingConfig("embed"))


def test_the_order_of_work_reads_no_media() -> None:
    config = PromptConfig(messages_column="m", images_column=["i", "j"], videos_column="v")
    assert select_prompt_columns(config, ["m", "i", "j", "v", "x"]) == ["m", "i", "j", "v"]
    assert select_prompt_columns(config.without_media, ["m", "i", "j", "v", "x"]) == ["m"]
    text_of = make_prompt_text_fn(config)
    long = f"data:image/png;base64,{'A' * 100_000}"
    text = text_of(
        {"m": make_user({"type": "image"}, {"type": "image", "image": long}, {"type": "text", "text": "Hi"})}
    )
    assert "Hi" in text
    assert len(text) < 300, "an image's bytes are no text to compare or to measure by"


def test_a_media_column_that_is_not_there_is_named_with_its_key() -> None:
    config = PromptConfig(prompt_column="p", images_column=["image", "b"], audios_column="c")
    with pytest.raises(ConfigError) as raised:
        check_prompt_columns(config, ["p", "images"])
    assert "data.images_column: 'image' is no column of the dataset; did you mean 'images'?" in str(raised.value)
    assert "data.images_column: 'b'" in str(raised.value)
    assert "data.audios_column: 'c'" in str(raised.value)


def test_a_medium_is_shown_without_its_contents() -> None:
    big = MediaPart("image", "i", source=f"data:image/png;base64,{'A' * 1_000_000}")
    assert repr(big) == "<image, 750.0 kB>"
    assert repr(MediaPart("image", "i", b"\0" * 31_000)) == "<image, 31.0 kB>"
    assert repr(MediaPart("image", "i", b"\0", "a.png")) == "<image a.png>"
    assert repr(MediaPart("audio", "i")) == "<audio>"
    assert len(repr(MediaPart("image", "i", source="x" * 10_000))) < 100
