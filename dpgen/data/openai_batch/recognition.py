"""Recognise batch files, for `data.format=auto`."""

from __future__ import annotations

import dataclasses
import json
import lzma

import pyarrow as pa

from dpgen.config.schema import Config
from dpgen.data.openai_batch.lines import LINE_KEYS
from dpgen.data.reading.files import find_all_files
from dpgen.data.reading.source import UnreadableInput, open_file
from dpgen.data.storage.fetched_input import FetchedInput, fetch_input

_NUM_LINES = 5  # looked at, at most: the first may be malformed
_MAX_LINE_BYTES = 64 << 20


def resolve_format(config: Config, fetched: FetchedInput | None = None) -> Config:
    """Return the configuration with a `data.format` other than auto.

    Args:
        fetched: the section `data` with files in place of addresses; None to fetch them now, where they are looked at.

    Raises:
        ConfigError: the input is not there; or the configuration is wrong for what the input holds.
    """
    if config.data.format != "auto":
        return config
    is_batch = config.reads_requests and _is_batch(fetched or fetch_input(config.data))
    data = dataclasses.replace(config.data, format="openai_batch" if is_batch else "rows")
    return dataclasses.replace(config, data=data)


def _is_batch(fetched: FetchedInput) -> bool:
    with fetched.name_addresses():
        files = find_all_files(fetched.data.path)
    return bool(files) and looks_like_requests(files[0])


def looks_like_requests(file: str) -> bool:
    """Return True if one of a file's first lines is an object with the keys of a request.

    An unreadable file is none: whoever reads it says why.
    """
    try:
        with open_file(file) as stream:
            num_lines = 0
            while num_lines < _NUM_LINES:
                line = stream.readline(_MAX_LINE_BYTES)
                if not line:
                    return False
                if not line.strip():
                    continue
                num_lines += 1
                try:
                    value = json.loads(line.decode("utf-8-sig", "replace"))
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, dict) and set(LINE_KEYS) <= value.keys():
                    return True
            return False
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException, UnreadableInput):
        return False
