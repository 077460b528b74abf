"""Rows with images on real vLLM: token ids, pixels and texts are those of LLM.chat, whatever dies."""

from __future__ import annotations

import base64
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import REPO, Launcher, find_engine_pids, load_result, wait_for
from helpers.results import count_journal_bytes
from helpers.tiny_vision import ENGINE, make_image, save_tiny_vision

pytestmark = [pytest.mark.vllm, pytest.mark.multi, pytest.mark.slow, pytest.mark.xdist_group("images_vllm")]

SIZES = [(40, 30), (30, 200), (56, 56), (300, 90), (8, 8)]
FORMS = [("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("GIF", "P"), ("PNG", "LA"), ("BMP", "1")]
NUM_ROWS = 20
BAD = {7: b"broken", 12: make_image(3)[:120]}

# Renders the chats as LLM.chat does, and generates. Compares each input of its engine with that of dpgen's worker.
REFERENCE = """
import json, os, sys
from vllm import LLM, SamplingParams
from dpgen.config.prompt import PromptConfig
from dpgen.data.media.policy import MediaPolicy
from dpgen.data.prompts.chat import validate_messages
from dpgen.engine.media.buffers import MediaBuffer
from dpgen.engine.media.handling import PreparedAnswer, encode_prompt
from dpgen.engine.messages import EngineSpec
from dpgen.engine.vllm.media import processing
from dpgen.engine.vllm.media.features import make_engine_prompt
from dpgen.records import Request, RequestId

given = json.loads(sys.argv[1])
chats = json.load(open(given["chats"]))
prompt = PromptConfig(messages_column="messages")
handle, _ = processing.start(EngineSpec("vllm", given["model"], given["engine"]), prompt, 2)
own = {"template_kwargs": {}, "is_continued": False, "add_generation_prompt": True, "add_special_tokens": False}
prepared = []
for chat in chats:
    buffer = MediaBuffer()
    buffer.write(encode_prompt({"messages": validate_messages(chat), **own}, MediaPolicy()))
    prepared.append((buffer, handle(buffer.address)))

os.environ["VLLM_MEDIA_CONNECTOR"] = "http"  # vLLM's own again
llm = LLM(given["model"], **given["engine"])
inputs = [llm._preprocess_chat_one(chat) for chat in chats]
outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
texts = [output.outputs[0].text for output in outputs]
num_equal = 0
for output, expected, (buffer, answer) in zip(outputs, inputs, prepared, strict=True):
    assert isinstance(answer, PreparedAnswer), answer
    assert answer.token_ids.tolist() == list(expected["prompt_token_ids"]) == list(output.prompt_token_ids)
    made = make_engine_prompt(Request(RequestId(0), None, media=buffer.address), answer.token_ids.tolist())
    if expected["type"] == "token":
        assert not made["mm_kwargs"]
        continue
    assert made["mm_hashes"] == expected["mm_hashes"]
    for modality, positions in expected["mm_placeholders"].items():
        for position, other in zip(positions, made["mm_placeholders"][modality], strict=True):
            assert (position.offset, position.length) == (other.offset, other.length)
            assert position.is_embed is None or position.is_embed.equal(other.is_embed)
        for index, item in enumerate(expected["mm_kwargs"][modality]):
            values = made["mm_kwargs"][modality][index]
            assert item.keys() == values.keys()
            for name, element in item.items():
                assert element.data.dtype == values[name].data.dtype and element.data.equal(values[name].data)
                num_equal += 1
print("FOUND " + json.dumps({"texts": texts, "num_equal": num_equal}))
"""


def make_chat(row: int) -> list[dict[str, Any]]:
    """Return messages with no image, one or several, of many forms and sizes."""
    content: list[dict[str, Any]] = [{"type": "text", "text": f"number {row}: what is it?"}]
    for place in range(0 if row % 5 == 4 else 1 + row % 3):
        number = row if place < 2 else row - 1  # the same image twice in a row, and in two rows
        format, mode = FORMS[number % len(FORMS)]
        data = BAD.get(row) or make_image(number, SIZES[number % len(SIZES)], format, mode)
        url = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
        content.insert(2 * place, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]


CHATS = [make_chat(row) for row in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vision(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Return the text that LLM.chat gives each good row, once its inputs are known to be those of dpgen's workers."""
    folder = tmp_path_factory.mktemp("reference")
    good = [row for row in range(NUM_ROWS) if row not in BAD]
    (folder / "chats.json").write_text(json.dumps([CHATS[row] for row in good]))
    engine = {**ENGINE, "mm_processor_cache_gb": 0}
    given = {"model": str(model), "engine": engine, "chats": str(folder / "chats.json")}
    launcher = Launcher(folder)
    job = launcher.start(
        [launcher.python, "-c", REFERENCE, json.dumps(given)],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        PYTHONPATH=str(REPO),
    )
    try:
        assert job.wait() == 0, job.output
    finally:
        job.end()
    [line] = [line for line in job.output.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert found["num_equal"] >= 60, "pixels, masks and counts of about 26 images"
    return dict(zip(good, found["texts"], strict=True))


def test_texts_are_those_of_llm_chat_though_the_engine_and_then_the_run_are_killed(
    launcher: Launcher, model: Path, expected: dict[int, str], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    arguments = [
        *(f"model={model}", f"data.path={data}", "data.messages_column=messages", f"run.dir={tmp_path / 'run'}"),
        *(f"engine={json.dumps({**ENGINE, 'max_num_seqs': 1})}", "sampling.temperature=0", "sampling.max_tokens=32"),
        *("data.media_workers=2", "run.report=false", "work.reserve_rows=1"),
    ]
    job = launcher.dpgen("run", *arguments)
    wait_for(lambda: count_journal_bytes(tmp_path / "run") > 300)
    for engine in find_engine_pids(job):
        os.kill(engine, signal.SIGKILL)
    wait_for(lambda: "engine restarted" in job.output or job.process.poll() is not None)
    job.end()
    again = launcher.dpgen("run", *arguments)
    assert again.wait() == 0, again.output
    rows = load_result(tmp_path / "run")
    errors = {row["row_id"]: row["error"]["type"] for row in rows if row["error"]}
    assert errors == dict.fromkeys(BAD, "media_invalid")
    texts = {row["row_id"]: row["generated_text"] for row in rows if not row["error"]}
    assert texts == expected
    assert len(set(texts.values())) > NUM_ROWS / 2, "different images get different answers"


def test_the_recipe_reads_images_that_lie_beside_its_rows(launcher: Launcher, model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(make_image(number))
    images = ["photos/0.png", "photos/1.png", "photos/none.png", None, "photos/0.png"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": "what is it?", "image": image}) + "\n" for image in images))
    job = launcher.dpgen(
        "run",
        str(REPO / "conf" / "images.yaml"),
        *(f"model={model}", f"data.path={data}", f"run.dir={tmp_path / 'run'}", "run.report=false"),
        *(f"engine={json.dumps(ENGINE)}", "sampling.temperature=0", "sampling.max_tokens=8"),
    )
    assert job.wait() == 0, job.output
    results = load_result(tmp_path / "run")
    assert [row["error"] and row["error"]["type"] for row in results] == [None, None, "media_missing", None, None]
    texts = [row["generated_text"] for row in results]
    assert texts[0] == texts[4] and len({texts[0], texts[1], texts[3]}) == 3
