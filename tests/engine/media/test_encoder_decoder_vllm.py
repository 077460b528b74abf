"""A model with an encoder (Whisper) on real vLLM: rows with audio get what vLLM itself gives, and others an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.jobs import REPO, Launcher
from helpers.tiny_whisper import ENGINE, save_tiny_whisper

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("images_vllm")]

# One engine answers what a worker of dpgen's has prepared, and the same as a program of vLLM's own would ask it.
SCRIPT = """
import json, sys
from vllm import SamplingParams
from vllm.multimodal.media.audio import AudioMediaIO
from dpgen.config.prompt import PromptConfig
from dpgen.data.media.parts import MediaPart, MediaText
from dpgen.data.media.policy import MediaPolicy
from dpgen.engine.media.buffers import MediaBuffer
from dpgen.engine.media.handling import encode_prompt
from dpgen.engine.messages import EngineSpec, EngineTextConfig
from dpgen.engine.vllm.media import processing
from dpgen.engine.vllm.vllm_backend import VllmBackend
from dpgen.errors import RowRefused
from dpgen.records import Request, RequestId
from helpers.tiny_whisper import START, decode_sound, make_sound

model, engine = json.loads(sys.argv[1])
AudioMediaIO.load_bytes = lambda self, data: decode_sound(data)
sampling = {"temperature": 0, "max_tokens": 10}
spec = EngineSpec("vllm", model, engine, sampling, token_ids=True, takes_media=True)
handle, _ = processing.start(spec, PromptConfig(prompt_column="prompt", audios_column="audio"), 1)
backend = VllmBackend(spec)
backend.check_options()
backend.load(lambda num_bytes: num_bytes)
backend.prepare_job(EngineTextConfig())

def run(add):
    found = {}
    for number in range(4):
        add(number)
    while backend.has_unfinished_requests():
        for result in backend._engine.step():
            found[int(result.request_id.split("-")[-1])] = list(result.outputs[0].token_ids)
    return found

def add_own(number):
    audio = {"audio": decode_sound(make_sound(number))}
    prompt = {"prompt": START + "<|en|>", "multi_modal_data": audio}
    backend._engine.add_request(f"own-{number}", prompt, SamplingParams(**sampling, detokenize=False))

expected, num_prompt_tokens = run(add_own), []
for number in range(4):
    buffer = MediaBuffer()
    prompt = MediaText(START + "<|en|>", (MediaPart("audio", "audio", make_sound(number)),))
    buffer.write(encode_prompt(prompt, MediaPolicy()))
    answer = handle(buffer.address)
    num_prompt_tokens.append(len(answer.token_ids))
    backend.add_request(Request(RequestId(number), answer.token_ids.tolist(), media=buffer.address))
found = {}
while backend.has_unfinished_requests():
    for result in backend.step():
        found[result.row] = list(result.completions[0].token_ids)
try:
    backend.add_request(Request(RequestId(9), [1, 2]))
    refused = None
except RowRefused as error:
    refused = [error.type, error.message]
print("FOUND " + json.dumps([expected == found, len({*map(tuple, found.values())}), num_prompt_tokens, refused]))
"""


def test_audio_is_heard_as_vllm_hears_it_and_a_row_without_any_is_an_error(launcher: Launcher, tmp_path: Path) -> None:
    model = save_tiny_whisper(tmp_path / "model")
    job = launcher.start(
        [sys.executable, "-c", SCRIPT, json.dumps([str(model), ENGINE])],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        PYTHONPATH=f"{REPO}:{REPO / 'tests'}",
    )
    assert job.wait() == 0, job.output
    [line] = [line for line in job.output.splitlines() if line.startswith("FOUND ")]
    is_equal, num_different, num_prompt_tokens, refused = json.loads(line.removeprefix("FOUND "))
    assert is_equal, "the tokens are those of the same audio, given to vLLM itself"
    assert num_different > 1, "different audio, different answers"
    assert num_prompt_tokens == [2] * 4, "the prompt is the decoder's"
    assert refused[0] == "unsupported_content" and "the row has none" in refused[1]
