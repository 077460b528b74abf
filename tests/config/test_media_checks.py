"""Test that keys about images, audio and video that make no sense are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from dpgen.config.schema import Config
from dpgen.config.sections import DataConfig, RunConfig
from dpgen.errors import ConfigError


def make(task: Any = "generate", **keys: Any) -> Config:
    return Config(RunConfig(dir="run"), DataConfig(**{"path": "a.parquet", "prompt_column": "p"} | keys), "m", task)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"images_column": 3}, "data.images_column=3: must be a column's name, a list of columns, or null"),
        ({"images_column": []}, "data.images_column=[]: must be"),
        ({"audios_column": ["a", None]}, "data.audios_column=['a', None]: must be"),
        (
            {"images_column": "i", "videos_column": ["v", "i"]},
            "data.images_column and data.videos_column: the column 'i'",
        ),
        ({"fetch_urls": ["http://x.org"]}, "'http://x.org' is no host"),
        ({"fetch_urls": ["x.org/a"]}, "'x.org/a' is no host"),
        ({"fetch_urls": ["*"]}, "'*' is no host"),
        ({"fetch_urls": [""]}, "'' is no host"),
        ({"media_workers": 0}, "data.media_workers=0: must be auto, or a whole number of at least 1"),
        ({"media_workers": True}, "data.media_workers=True"),
        ({"media_workers": "many"}, "data.media_workers='many'"),
        ({"media_dir": "s3://bucket"}, "data.media_dir=s3://bucket: must be a folder on a disk"),
        ({"max_media_bytes": 0}, "data.max_media_bytes=0: must be at least 1"),
        ({"images_column": "i", "completion_column": "c"}, "data.images_column and data.completion_column are set"),
        ({"images_column": "i", "prompt_column": None, "token_ids_column": "t"}, "token ids have no places for media"),
        ({"audios_column": "i", "task": "embed"}, "data.audios_column needs task=generate: task=embed reads texts"),
        ({"images_column": "i", "prompt_column": None, "format": "openai_batch"}, "data.images_column has no effect"),
    ],
)
def test_keys_that_make_no_sense_are_named_with_the_way_out(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make(**keys)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"images_column": "i"},
        {"images_column": ["i", "j"], "audios_column": "a", "videos_column": "v", "as_chat": True},
        {"fetch_urls": ["x.org", "*.x.org", "x.org:8080", "127.0.0.1", "a_b.x.org"], "media_workers": 4},
    ],
)
def test_keys_that_make_sense_are_taken(keys: dict[str, Any]) -> None:
    data = make(**keys).data
    assert {name: getattr(data, name) for name in keys} == keys
