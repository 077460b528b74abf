"""Make a random Idefics3 (SmolVLM's kind) of two layers and a tower of two: it reads images, and real vLLM runs it.

Large images are split into tiles, so the number of tokens follows from an image's size. The image processor needs no
torchvision: transformers has one that works with Pillow alone.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from helpers.tiny_tokenizers import add_special_tokens, save_tokenizer

TILE_SIZE, PATCH_SIZE, SCALE = 56, 14, 2
MAX_TILES = 2  # in a row, and in a column
TOKENS_PER_TILE = (TILE_SIZE // PATCH_SIZE // SCALE) ** 2
_IMAGE = "<image>"
_TILES = [f"<row_{row + 1}_col_{column + 1}>" for row in range(MAX_TILES) for column in range(MAX_TILES)]
_TEMPLATE = """\
{%- for message in messages %}
{{- message.role + ':' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}
{%- endif %}
{{- ';' }}
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""
ENGINE = {
    "dtype": "float32",  # so that the CPU's results don't depend on the batch, and can be compared
    "max_model_len": 512,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "limit_mm_per_prompt": {"image": 3},
}


def save_tiny_vision(folder: Path) -> Path:
    """Write the model and return its folder; the weights are always the same."""
    import torch
    from transformers import AutoTokenizer, Idefics3Config, Idefics3ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer("plain", folder)
    add_special_tokens(folder, _IMAGE, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_TILES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    shape = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = Idefics3Config(
        vision_config={**shape, "image_size": TILE_SIZE, "patch_size": PATCH_SIZE},
        text_config={
            **shape,
            "vocab_size": 512,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        scale_factor=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids(_IMAGE),
        pad_token_id=end,
    )
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # wider than at a model's birth, so that different images get different answers
            parameter.data.normal_(0, 0.3 if "connector" in name else 0.1)
    with torch.no_grad():  # answers are of letters, which texts show
        model.lm_head.weight[:3] = 0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(_IMAGE) :] = 0
    model.save_pretrained(folder)
    processor = {
        "processor_class": "Idefics3Processor",
        "image_seq_len": TOKENS_PER_TILE,
        "image_processor": _describe_image_processor(),
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    return folder


def make_image(number: int, size: tuple[int, int] = (40, 30), format: str = "PNG", mode: str = "RGB") -> bytes:
    """Return the file of an image; another one for each number."""
    from PIL import Image

    image = Image.new("RGB", size, (37 * number % 256, 91 * number % 256, 11))
    for place in range(number % 8 + 1):
        image.paste((255, 20 * place, 0), (3 * place, 2 * place, 3 * place + 5, 2 * place + 9))
    file = io.BytesIO()
    image.convert(mode).save(file, format)
    return file.getvalue()


def _describe_image_processor() -> dict[str, Any]:
    return {
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "size": {"longest_edge": MAX_TILES * TILE_SIZE},
        "max_image_size": {"longest_edge": TILE_SIZE},
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 1,
        "rescale_factor": 1 / 255,
    }
