"""Make a random Whisper of two layers, which hears one second: a model with an encoder that real vLLM runs."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

from helpers.tiny_tokenizers import add_special_tokens, save_tokenizer

START = "<|startoftranscript|>"
SAMPLES_PER_S = 4000
ENGINE = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}


def save_tiny_whisper(folder: Path) -> Path:
    """Write the model and return its folder; the weights are always the same."""
    import torch
    from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer("plain", folder)
    add_special_tokens(folder, START, "<|en|>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids(START),
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()},
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # wider than at a model's birth, so that different sounds get different answers
            parameter.data.normal_(0, 0.5 if "encoder_attn" in name or "conv" in name else 0.1)
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(folder)
    WhisperFeatureExtractor(
        feature_size=8, sampling_rate=SAMPLES_PER_S, hop_length=SAMPLES_PER_S // 100, chunk_length=1, n_fft=200
    ).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    extractor = {**json.loads(path.read_text()), "processor_class": "WhisperProcessor"}
    path.write_text(json.dumps(extractor))
    processor = {"processor_class": "WhisperProcessor", "feature_extractor": extractor}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def make_sound(number: int) -> bytes:
    """Return a WAV file of a tone; another one for each number."""
    import numpy as np

    tone = np.sin(np.arange(3000) * (0.1 + 0.3 * number)) * (20_000 - 3000 * number)
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SAMPLES_PER_S)
        sound.writeframes(tone.astype("<i2").tobytes())
    return file.getvalue()


def decode_sound(data: bytes) -> tuple[Any, int]:
    """Return the samples of a file that `make_sound` made, and how many there are a second.

    It stands in for vLLM's decoder, which wants a package that tests do without.
    """
    import numpy as np

    with wave.open(io.BytesIO(data)) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype("float32") / 32768
        return samples, sound.getframerate()
