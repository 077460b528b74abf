"""Errors of the Hugging Face Hub, as a user reads them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.jobs import Launcher
from helpers.tiny_tokenizers import save_tokenizer

from dpgen.data.hub import check_cache
from dpgen.data.tokenizer import TokenizerConfig, load_tokenizer
from dpgen.errors import ConfigError

# What the Hub answers to each repository: status, and its name for the error.
ANSWERS = {"meta/gated": (403, "GatedRepo"), "meta/anonymous": (401, "GatedRepo"), "no/body": (401, "RepoNotFound")}
ANSWERS |= {"bad/token": (403, ""), "no/page": (404, "")}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, code = next((answer for name, answer in ANSWERS.items() if name in self.path), (404, "RepoNotFound"))
        if self.path.endswith("meta/gated/resolve/main/README.md"):  # which a dataset need not have
            status, code = 404, "EntryNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def serve_hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PROGRAM = """
import sys
from dpgen.data.tokenizer import TokenizerConfig, load_tokenizer
from dpgen.errors import ConfigError

for name in sys.argv[1:]:
    try:
        load_tokenizer(TokenizerConfig(name))
    except ConfigError as error:
        print(f"REPORT {error}", flush=True)
"""

DATASETS_PROGRAM = """
import sys
from dpgen.config.sections import DataConfig
from dpgen.data.input_loading import load_input
from dpgen.errors import ConfigError

for name in sys.argv[1:]:
    try:
        load_input(DataConfig(path=[name]))
    except ConfigError as error:
        print(f"REPORT {error}", flush=True)
"""


def test_a_repository_that_the_hub_does_not_give_out_says_what_to_do(launcher: Launcher, tmp_path: Path) -> None:
    with serve_hub() as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
        job = launcher.start([launcher.python, "-c", PROGRAM, *ANSWERS], **environment)
        assert job.wait() == 0, job.output
    lines = [line.removeprefix("REPORT ") for line in job.output.splitlines() if line.startswith("REPORT ")]
    gated, anonymous, missing, refused, page = (line.partition(": ") for line in lines)
    log_in = "log in (`hf auth login`, or set HF_TOKEN) on every node"
    assert gated[0] == "cannot load the tokenizer of meta/gated"
    for (_, _, message), name, status in ((gated, "meta/gated", 403), (anonymous, "meta/anonymous", 401)):
        assert message.startswith(f"{name} is a gated repository and the Hub refuses access to it (status {status}): ")
        assert message.endswith(f"accept its terms at {endpoint}/{name} and {log_in}")
    assert missing[2] == f"there is no repository no/body on the Hub, or it is private: check the name, or {log_in}"
    assert refused[2] == f"the Hub refuses access to bad/token (status 403): check HF_TOKEN, or {log_in}"
    assert page[2] == f"the Hub answered with status 404 for no/page: check HF_ENDPOINT ({endpoint})"


def test_a_dataset_that_the_hub_does_not_give_out_says_what_to_do(launcher: Launcher, tmp_path: Path) -> None:
    with serve_hub() as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
        job = launcher.start([launcher.python, "-c", DATASETS_PROGRAM, "meta/gated", "no/page"], **environment)
        assert job.wait() == 0, job.output
    gated, page = (line.removeprefix("REPORT ") for line in job.output.splitlines() if line.startswith("REPORT "))
    assert gated.startswith("data.path=meta/gated: meta/gated is a gated repository and the Hub refuses access to it")
    assert f": accept its terms at {endpoint}/datasets/meta/gated and log in" in gated
    assert page == (f"data.path=no/page: the Hub answered with status 404 for no/page: check HF_ENDPOINT ({endpoint})")


def test_a_name_that_is_neither_here_nor_reached_says_where_to_look(launcher: Launcher, tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path / 'run'}", "run.engine=fake", "model=m", "data.prompt_column=prompt"]
    command = [launcher.python, "-m", "dpgen", "run", *settings, "data.path=nobody/nothing"]
    dataset = launcher.start(command, HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    model = launcher.start(
        [launcher.python, "-c", PROGRAM, "nobody/nothing"], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)
    )
    assert (dataset.wait(), model.wait()) == (2, 0), dataset.output + model.output
    assert (
        f"nobody/nothing is no folder here and not in the Hub's cache ({tmp_path}/hub), and HF_HUB_OFFLINE is set: "
        "check the name, or download it where there is a network (`hf download`)\n"
    ) in model.output
    assert (
        "data.path=nobody/nothing: nobody/nothing is no folder here, and HF_DATASETS_OFFLINE is set: check the name, "
        "or download it where there is a network, with `hf download nobody/nothing --repo-type dataset --local-dir "
        "DIR`, and set data.path=DIR\n"
    ) in dataset.output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
        ('{"version": "1.0", "tr', "tokenizer.json is damaged: Unterminated string"),
    ],
    ids=["a pointer", "half of it"],
)
def test_a_tokenizer_that_is_not_whole_names_its_file(tmp_path: Path, content: str, words: str) -> None:
    folder = save_tokenizer("bos", tmp_path / "tokenizer")
    load_tokenizer(TokenizerConfig(str(folder)))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=f"cannot load the tokenizer of {folder}: .*{words}"):
        load_tokenizer(TokenizerConfig(str(folder)))


def test_a_cache_that_can_not_be_written_names_its_folder_and_variables(tmp_path: Path) -> None:
    check_cache(tmp_path / "new" / "cache", "a cache", "A_VARIABLE")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"a cache, .*/file/cache, can't be written: .*\. Set A_VARIABLE to a folder"):
        check_cache(tmp_path / "file" / "cache", "a cache", "A_VARIABLE")
    with pytest.raises(ConfigError, match="can't be written"):
        check_cache("/proc/nowhere", "a cache", "A_VARIABLE")
