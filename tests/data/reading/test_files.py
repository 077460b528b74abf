"""The files that are read are those that the user named, as they are on the disk now."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather
from pyarrow import parquet as pq

from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.data.input_rows import InputRows
from dpgen.data.reading import cache
from dpgen.data.reading.files import check_run_dir_apart
from dpgen.data.reading.json_lines import _measure_lines
from dpgen.data.reading.source import iter_line_batches, open_file
from dpgen.errors import ConfigError


def load(path: object, **keys: Any) -> InputRows:
    return load_input(DataConfig(path=path, prompt_column="question", **keys))


def read(rows: InputRows) -> list[str]:
    return [row["question"] for row in rows.iter_rows(np.arange(len(rows)), ["question"])]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".jsonl", ".json")):
            path.write_text(json.dumps({"question": name}) + "\n")
        else:
            path.write_text(f"question\n{name}\n")
    return folder


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["math.jsonl", "test_hard.jsonl"], "1 file: math.jsonl"),
        (["train.jsonl", "extra.jsonl", "deep/more.jsonl"], "2 files: extra.jsonl, deep/more.jsonl"),
        (["a.csv", "b.jsonl", "c.csv"], "1 file: b.jsonl"),
        (["train/a.jsonl", "b.jsonl"], "1 file: b.jsonl"),
    ],
)
def test_a_folder_of_which_files_would_be_left_out_is_refused(tmp_path: Path, names: list[str], left_out: str) -> None:
    with pytest.raises(ConfigError, match=f"would be read without {left_out}"):
        load(str(write(tmp_path, *names)))


def test_all_files_of_a_folder_are_read(tmp_path: Path) -> None:
    rows = load(str(write(tmp_path, "b.jsonl", "a.jsonl", "deep/c.jsonl", "README.md", "config.json", "part-0")))
    assert sorted(read(rows)) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert rows.describe(["question"]) == "read 3 json files, 3 rows, 1 column (used: question); not read: part-0"


def test_splits_of_a_folder_can_be_joined_and_cut(tmp_path: Path) -> None:
    folder = str(write(tmp_path, "train-1.jsonl", "train-2.jsonl", "test.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.split is needed: there are test, train"):
        load(folder)
    assert read(load(folder, split="test")) == ["test.jsonl"]
    assert read(load(folder, split="test+train")) == ["test.jsonl", "train-1.jsonl", "train-2.jsonl"]
    assert read(load(folder, split="train[1:]", limit=1)) == ["train-2.jsonl"]


def test_configurations_of_a_folder_are_named(tmp_path: Path) -> None:
    write(tmp_path, "x/a.jsonl", "x/b.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: x/a.jsonl\n- config_name: b\n  data_files: x/b.jsonl\n---\n"
    )
    with pytest.raises(ConfigError, match=r"data\.name is needed: .* holds the configurations a, b"):
        load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.name=c is not there: .* holds the configurations a, b"):
        load(str(tmp_path), name="c")
    assert read(load(str(tmp_path), name="b")) == ["x/b.jsonl"]


def test_a_glob_that_matches_what_is_no_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "deep/b.jsonl")
    with pytest.raises(ConfigError, match=r"matches .*/deep, which can't be read as files"):
        load(f"{tmp_path}/*")
    assert read(load(f"{tmp_path}/**/*.jsonl")) == ["a.jsonl", "deep/b.jsonl"]
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"matches .*/c\.jsonl, which can't be read"):
        load(f"{tmp_path}/**/*.jsonl")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.JSONL"], r"a\.JSONL would not be read by their names\. Name the files: data\.path=.*/\*\.JSONL"),
        (["a.jsonl", "b.jsonl.bak"], r"would also read .*b\.jsonl\.bak, which is no data file by its name"),
        (["a.csv", "b.tsv"], "several kinds: csv, tsv"),
    ],
)
def test_names_that_datasets_takes_otherwise_are_refused(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(str(write(tmp_path, *names)))


def test_a_folder_in_a_list_is_not_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "deep/b.jsonl")
    with pytest.raises(ConfigError, match=r"may list files, not directories or Hub names: .*/deep"):
        load([str(tmp_path / "a.jsonl"), str(tmp_path / "deep")])
    with pytest.raises(ConfigError, match=r"data\.path=\[\] names no file"):
        load([])
    with pytest.raises(ConfigError, match="Braces are no pattern: write a list of paths"):
        load(str(tmp_path / "{a,b}.jsonl"))


def test_what_only_the_names_of_files_tell_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, "lang=de/a.jsonl", "lang=en/b.jsonl")
    rows = load([f"{folder}/*/*.jsonl", f"{folder}/lang=de/a.jsonl"])
    assert read(rows) == ["lang=de/a.jsonl", "lang=en/b.jsonl", "lang=de/a.jsonl"]
    assert f"read more than once: {folder}/lang=de/a.jsonl" in rows.describe([])
    assert "the names of folders are no columns: lang=de, lang=en" in rows.describe([])


def test_a_link_back_to_its_folder_is_walked_once(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "note")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert load(str(tmp_path)).describe([]) == "read 1 json file, 1 row, 1 column; not read: note"


def test_a_glob_reads_the_files_of_a_folder_once_however_links_name_it(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "deep/c.jsonl")
    (tmp_path / "Loop").symlink_to(".")
    (tmp_path / "deep" / "back").symlink_to(tmp_path)
    (tmp_path / "link.jsonl").symlink_to("b.jsonl")
    rows = load(f"{tmp_path}/**/*.jsonl")
    assert read(rows) == ["b.jsonl", "deep/c.jsonl", "b.jsonl"]
    assert f"read more than once: {tmp_path}/b.jsonl" in rows.describe([]), "a link to a file was made on purpose"
    assert read(load(f"{tmp_path}/Loop/*.jsonl")) == ["b.jsonl", "b.jsonl"]


@pytest.mark.parametrize("path", ["{}", "{}/**/*.jsonl", ["{}/**"]])
def test_a_run_directory_inside_the_input_is_refused(tmp_path: Path, path: Any) -> None:
    path = [part.format(tmp_path) for part in path] if isinstance(path, list) else path.format(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.dir=.*/run is inside data\.path=.*Choose a run directory elsewhere"):
        check_run_dir_apart(path, tmp_path / "run")
    check_run_dir_apart(path, tmp_path.parent / "run")
    check_run_dir_apart(str(tmp_path / "*.jsonl"), tmp_path / "run")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_replaced_by_one_of_the_same_date_and_size_is_read_again(tmp_path: Path, in_place: bool) -> None:
    path = tmp_path / "rows.jsonl"
    padding = {"padding": "x" * 10_000}  # the change is neither in the first nor in the last bytes
    path.write_text(json.dumps({**padding, "question": "old", "more": "x" * 10_000}) + "\n")
    before = path.stat()
    assert read(load(str(path))) == ["old"]
    content = path.read_text().replace("old", "new")
    if not in_place:
        path.unlink()
    path.write_text(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(load(str(path))) == ["new"]
    folder = write(tmp_path / "folder")
    folder.mkdir()
    os.rename(path, folder / "train.jsonl")
    assert read(load(str(folder))) == ["new"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "rows.jsonl") / "rows.jsonl"

    def grow(*arguments: Any, **keys: Any) -> Any:
        description = convert(*arguments, **keys)
        with path.open("a") as file:
            file.write('{"question": "late"}\n')
        return description

    convert = cache.convert
    monkeypatch.setattr(cache, "convert", grow)
    with pytest.raises(ConfigError, match="the files changed while they were read"):
        load(str(path))


def test_a_reader_whose_peer_is_faster_takes_what_the_peer_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ranks of all nodes share a cache folder; the peer's is there just before this one's is renamed."""
    path = write(tmp_path, "rows.jsonl") / "rows.jsonl"

    def rename_later(folder: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        peers_rows.extend(read(load(str(path))))
        return rename(folder, target)

    peers_rows: list[Any] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", rename_later)
    assert read(load(str(path))) == peers_rows != []


@pytest.mark.parametrize("cache_folder", ["/dev/null/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: str
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder)
    with pytest.raises(ConfigError, match=f"the cache folder {cache_folder} can't be .*HF_DATASETS_CACHE or HF_HOME"):
        load(str(write(tmp_path, "rows.jsonl") / "rows.jsonl"))


def test_a_reader_that_crashes_is_an_error_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import json, os, pathlib, signal, sys\nrequest = json.load(sys.stdin)\n"
    program += "pathlib.Path(request['folder'], 'place').write_text(request['files'][0] + ', row group 3')\n"
    program += "os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(cache, "_CHILD", [sys.executable, "-c", program])
    path = write(tmp_path, "rows.parquet") / "rows.parquet"
    with pytest.raises(ConfigError, match=r"rows\.parquet, row group 3: the reader crashed \(SIGSEGV\)"):
        load(str(path))


@pytest.mark.parametrize("is_sound", [True, False])
def test_json_that_crashes_arrow_is_read_by_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sound: bool
) -> None:
    monkeypatch.setattr(cache, "_SMALL_BYTES", 0)
    monkeypatch.setattr(
        cache, "_CHILD", [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
    )
    path = write(tmp_path, "rows.jsonl") / "rows.jsonl"
    if is_sound:
        assert read(load(str(path))) == ["rows.jsonl"]
        return
    path.write_text(path.read_text() + "[" * 100_000 + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2 is nested too deep"):
        load(str(path))


@pytest.mark.parametrize("suffix", ["parquet", "feather", "jsonl", "csv.gz"])
def test_a_file_whose_name_is_no_utf_8_is_read(tmp_path: Path, suffix: str) -> None:
    table, file = (
        pa.table({"question": ["a"] * 50_000}),
        os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9." + suffix.encode()),
    )
    with open(file, "wb") as stream:
        if suffix == "parquet":
            pq.write_table(table, stream)
        elif suffix == "feather":
            feather.write_feather(table, stream)
        elif suffix == "jsonl":
            stream.write(b'{"question": "a", "more": "..."}\n' * 50_000)  # above the size that is read in this process
        else:
            stream.write(gzip.compress(b"question\n" + b"a\n" * 50_000))
    assert read(load(f"{tmp_path}/*")) == ["a"] * 50_000


def test_a_damaged_file_whose_name_is_no_utf_8_is_named(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.parquet")
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/{name}: Parquet file size is 4 bytes")):
        load(f"{tmp_path}/*")


@pytest.mark.parametrize("name", ["in[1]", "a::b", "x*y"])
def test_a_folder_whose_name_is_a_pattern_is_refused_with_how_to_name_its_files(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"{name}/a.jsonl", f"{name}/deep/b.jsonl", "x-y/other.jsonl")
    with pytest.raises(
        ConfigError, match=r"takes a folder's path for a pattern.* Rename the folder, or name"
    ) as raised:
        load(str(tmp_path / name))
    assert read(load(str(raised.value).rpartition("data.path=")[2])) == [
        f"{name}/a.jsonl",
        f"{name}/deep/b.jsonl",
    ]


def test_a_glob_in_a_folder_whose_name_is_a_pattern_is_told_how_to_write_it(tmp_path: Path) -> None:
    write(tmp_path, "in[1]/a.jsonl")
    with pytest.raises(ConfigError, match=r"no file matches .*; in the folder of that very name: ") as raised:
        load(f"{tmp_path}/in[1]/*.jsonl")
    assert read(load(str(raised.value).rpartition("data.path=")[2])) == ["in[1]/a.jsonl"]


def test_a_folder_whose_name_is_a_pattern_of_itself_alone_is_read(tmp_path: Path) -> None:
    assert read(load(str(write(tmp_path / "why?", "a.jsonl")))) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (b"---\nconfigs: [\n---\n", r"line 2: expected the node content"),
        (b"---\nconfigs: 5\n---\n", "Expected configs to be a list"),
        (b"Caf\xe9\n", r"it is no UTF-8 \(byte 0xe9 at 3\)"),
    ],
)
def test_a_card_that_can_not_be_read_is_named(tmp_path: Path, card: bytes, reason: str) -> None:
    (write(tmp_path, "a.jsonl") / "README.md").write_bytes(card)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/README\.md, in which .*: {reason}.*\. Mend or move it"):
        load(str(tmp_path))


def test_one_object_over_several_lines_that_is_read_as_a_table_is_noted(tmp_path: Path) -> None:
    """pandas writes tables by columns, while other programs write a single row like this."""
    row = {"question": [{"role": "user"}, {"role": "assistant"}]}
    (tmp_path / "row.json").write_text(json.dumps(row))
    (tmp_path / "table.json").write_text(json.dumps(row, indent=1))
    assert load(f"{tmp_path}/row.json").describe([]) == "read 1 json file, 1 row, 1 column"
    rows = load(f"{tmp_path}/table.json")
    assert len(rows) == 2
    assert "is a table by columns; if it is one row, write it on one line (first: " in rows.describe([])


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.parquet") / "rows.parquet"
    with pytest.raises(ConfigError, match=r"rows\.parquet: "):
        load(str(path))


def test_files_of_several_kinds_are_named(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "b.jsonl")
    with pytest.raises(ConfigError, match=r"several kinds: csv, json \(.*a\.csv, .*b\.jsonl\)"):
        load(f"{tmp_path}/*")


@pytest.mark.parametrize("length", [10, 5_000], ids=["short lines", "long lines"])
@pytest.mark.parametrize("end", ["", "\n"], ids=["cut", "whole"])
def test_every_line_is_read_whole_wherever_a_batch_of_bytes_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, end: str
) -> None:
    monkeypatch.setattr("dpgen.data.reading.source.BATCH_BYTES", 1_000)
    lines = [json.dumps({"row": row, "text": "x" * (length + row % 7)}) for row in range(300)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n".join(lines) + end)
    with open_file(str(path)) as stream:
        batches = [bytes(batch) for batch in iter_line_batches(stream)]
    assert b"".join(batches).decode() == "\n".join(lines) + end
    assert len(batches) > 5 and all(batch.endswith(b"\n") for batch in batches[:-1])
    measured = [_measure_lines(batch) for batch in batches]
    assert sum(num_lines for _, num_lines in measured) == 300
    assert max(longest for longest, _ in measured) == max(map(len, lines)) + 1, "with its end"
    assert _measure_lines(batches[0] + b"\n" + batches[1])[0] == 0, "a blank line is no object"
    assert _measure_lines(b"[]\n" + batches[0])[0] == 0
