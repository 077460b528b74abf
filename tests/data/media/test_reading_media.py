"""Test that images of every kind of input reach a row undecoded, with the real `datasets`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.data.media.images import check_image
from dpgen.data.media.loading import load_media
from dpgen.data.media.policy import MediaPolicy
from dpgen.data.media.values import read_media

COLOURS = ("red", "green", "blue")


def make_png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with a picture in each colour."""
    folder = tmp_path / "rows" / "pictures"
    folder.mkdir(parents=True)
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(make_png(colour))
    return folder


def load_colours(path: Path, column: str) -> list[list[str]]:
    """Return the colours of each row's images, which the rank reads and a worker loads."""
    data = DataConfig(path=str(path))
    rows, policy = load_input(data), MediaPolicy.from_config(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("the rank decodes nothing"))
        values = [row[column] for row in rows.iter_rows(np.arange(len(rows)), [column])]
        found = [read_media("image", column, value) for value in values]
    return [[_find_colour(load_media(part, policy)) for part in parts] for parts in found]


def _find_colour(data: bytes) -> str:
    assert check_image(data, MediaPolicy()).format == "PNG"
    pixel = Image.open(io.BytesIO(data)).getpixel((0, 0))
    return {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}[pixel]  # type: ignore[index]


def make_dataset(values: list[Any], feature: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": values}, features=datasets.Features({"image": feature}))


@pytest.mark.parametrize("form", ["saved", "parquet", "arrow"])
def test_a_column_of_datasets_is_read_with_its_bytes_or_paths(form: str, pictures: Path) -> None:
    folder = pictures.parent
    paths = [str(pictures / f"{colour}.png") for colour in COLOURS]
    values = [paths[0], {"bytes": make_png("green"), "path": None}, None]
    single = make_dataset(values, datasets.Image())
    several = make_dataset([[paths[0], make_png("blue")], [], None], datasets.List(datasets.Image()))
    for dataset, expected in ((single, [["red"], ["green"], []]), (several, [["red", "blue"], [], []])):
        path = folder / f"{len(expected[0])}.{form}"
        if form == "saved":
            dataset.save_to_disk(str(path))
        elif form == "parquet":
            dataset.to_parquet(str(path))
        else:
            with path.open("wb") as stream:
                writer = __import__("pyarrow").ipc.new_stream(stream, dataset.data.table.schema)
                writer.write_table(dataset.data.table)
                writer.close()
        assert load_colours(path, "image") == expected


def test_paths_in_tables_of_text_are_relative_to_them(pictures: Path) -> None:
    folder = pictures.parent
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"image": value}) + "\n" for value in ("pictures/red.png", None, "pictures/blue.png"))
    )
    (folder / "lists.jsonl").write_text(json.dumps({"image": ["pictures/red.png", "./pictures/green.png"]}) + "\n")
    (folder / "rows.csv").write_text("q,image\nx,pictures/green.png\ny,\n")
    assert load_colours(folder / "rows.jsonl", "image") == [["red"], [], ["blue"]]
    assert load_colours(folder / "lists.jsonl", "image") == [["red", "green"]]
    assert load_colours(folder / "rows.csv", "image") == [["green"], []]


def test_a_folder_of_images_with_metadata_is_read_as_datasets_reads_it(pictures: Path) -> None:
    lines = [json.dumps({"file_name": f"{colour}.png", "question": colour}) for colour in COLOURS]
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    rows = load_input(DataConfig(path=str(pictures)))
    questions = [row["question"] for row in rows.iter_rows(np.arange(3), ["question"])]
    assert load_colours(pictures, "image") == [[question] for question in questions]
    assert sorted(questions) == sorted(COLOURS)
