"""Test what becomes of images in the result: the input's column, and references in conversations."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.dataset_files import make_run
from PIL import Image

from dpgen.config.sections import DataConfig
from dpgen.errors import ConfigError
from dpgen.output.verification import verify
from dpgen.records import Completion, RowResult

RESULTS = [RowResult(row, 3, (Completion(f"answer {row}", "stop", 1),)) for row in range(2)]


def make_png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Return a Parquet file of rows with images, as `datasets` writes it: with bytes, and with a path."""
    (tmp_path / "a.png").write_bytes(make_png())
    columns = {"q": ["What?", "And?"], "image": [{"bytes": make_png(), "path": None}, str(tmp_path / "a.png")]}
    features = datasets.Features({"q": datasets.Value("string"), "image": datasets.Image()})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    with (tmp_path / "rows.parquet").open("wb") as stream:
        dataset.to_parquet(stream)
    return tmp_path / "rows.parquet"


def read(run: Any) -> datasets.Dataset:
    return datasets.load_dataset(str(run.path / "dataset"), split="train")


def test_a_kept_column_of_images_is_one_for_datasets(rows: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(rows), prompt_column="q", as_chat=True, images_column="image")
    run = make_run(tmp_path / "out", data, RESULTS)
    result = read(run)
    assert isinstance(result.features["image"], datasets.Image)
    assert [image.size for image in result["image"]] == [(8, 6), (8, 6)]
    assert not verify(run.path).problems


def test_conversations_have_references_in_place_of_images(rows: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(rows), prompt_column="q", as_chat=True, images_column="image")
    run = make_run(tmp_path / "out", data, RESULTS, messages=True)
    result = read(run).remove_columns("image")
    contents = [[message["content"] for message in messages] for messages in result["messages"]]
    plain = [[[{k: v for k, v in part.items() if v} for part in parts] for parts in row] for row in contents]
    assert plain[0][0][0] == {"type": "image"}, "the bytes are in the column"
    assert plain[0][0][1:] == [{"type": "text", "text": "What?"}]
    assert plain[1][0][0]["type"] == "image"
    assert plain[0][1] == [{"type": "text", "text": "answer 0"}]


def test_images_inside_messages_are_written_by_their_names(tmp_path: Path) -> None:
    data_url = f"data:image/png;base64,{base64.b64encode(make_png()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in ("a.png", data_url, "https://x.org/b.png")]
    row = {"m": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), messages_column="m", columns=[])
    run = make_run(tmp_path / "out", data, RESULTS[:1], "jsonl", messages=True)
    [[user, answer]] = read(run)["messages"]
    assert user["content"] == "<image a.png>\n<image>\n<image https://x.org/b.png>\nWhat?"
    assert answer["content"] == "answer 0"


def test_json_lines_refuse_a_column_of_images_in_one_line(rows: Path, tmp_path: Path) -> None:
    from dpgen.data.input_loading import load_input
    from dpgen.output.format_check import check_output_format

    with pytest.raises(ConfigError) as raised:
        check_output_format(load_input(DataConfig(path=str(rows))), None, "jsonl")
    assert str(raised.value) == (
        "output.format=jsonl can't hold the column 'image': it holds bytes (image.bytes). Set output.format=parquet, "
        "or keep only other columns: data.columns=[q]"
    )
