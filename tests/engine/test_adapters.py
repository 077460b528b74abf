"""LoRA adapters are read before a model loads: their ranks set vLLM's options, and what is wrong is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_adapter import save_adapter
from safetensors.numpy import save_file

from dpgen.data import hub
from dpgen.engine.adapters import build_adapter_options, check_adapters, choose_num_slots, find_adapter_folders
from dpgen.errors import ConfigError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 5312\n"


def save_model(folder: Path, width: int = 128, num_layers: int = 2) -> str:
    """Write the weights that the adapters of `save_adapter` are for, as far as shapes tell."""
    folder.mkdir()
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(num_layers)]
    save_file({name: np.zeros((width, width), np.float32) for name in names}, folder / "model.safetensors")
    return str(folder)


def find_mistakes(adapter: Path, model: str = "some/model") -> list[str]:
    """Return what is wrong with an adapter; empty if it is accepted."""
    mistakes: list[str] = []
    try:
        check_adapters({"math": str(adapter)}, model)
    except ConfigError as error:
        mistakes += error.mistakes
    prefix = f"lora.math={adapter}: "
    assert all(mistake.startswith(prefix) for mistake in mistakes), "each names its adapter"
    return [mistake.removeprefix(prefix) for mistake in mistakes]


def write_config(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_config.json").write_text(content)


def write_weights(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(content)


def cut_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "is no adapter: {} holds no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "{} holds no weights (adapter_model.safet"),
        (write_config(POINTER), "adapter_config.json in {} is a Git LFS pointer, not the file itself: run `git lfs"),
        (write_config("{"), "{}/adapter_config.json is damaged"),
        (write_config("[]"), "is no adapter: its adapter_config.json holds no object"),
        (write_config('{"model_type": "llama"}'), "is no LoRA adapter: its adapter_config.json lacks r, lora_alpha"),
        (write_weights(POINTER.encode()), "adapter_model.safetensors in {} is a Git LFS pointer"),
        (write_weights(b""), "{}/adapter_model.safetensors is empty"),
        (cut_weights, "{}/adapter_model.safetensors is cut short"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = save_adapter(tmp_path / "math")
    damage(folder)
    [mistake] = find_mistakes(folder)
    assert mistake.startswith(message.format(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"peft_type": "PROMPT_TUNING"},
            "is an adapter of kind PROMPT_TUNING: vLLM applies adapters of kind LORA only",
        ),
        ({"r": None}, "is no LoRA adapter: its adapter_config.json lacks r"),
        ({"r": 0}, "r=0 in its adapter_config.json: vLLM applies ranks from 1 to 512"),
        ({"r": "8"}, "r='8' in its adapter_config.json"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank_pattern.q_proj=1024 in its adapter_config.json"),
        ({"use_dora": True}, "vLLM can't apply what it has: DoRA. Merge the adapter into the model"),
        ({"bias": "all"}, "vLLM can't apply what it has: biases"),
        ({"lora_bias": True, "bias": "lora_only"}, "vLLM can't apply what it has: biases. "),
        ({"modules_to_save": ["lm_head"]}, "vLLM can't apply what it has: whole modules of its own (lm_head)"),
        ({"init_lora_weights": "pissa"}, "vLLM can't apply what it has: init_lora_weights=pissa, which changes"),
        ({"use_dora": True, "use_qalora": True}, "vLLM can't apply what it has: DoRA, QALoRA. "),
    ],
)
def test_what_vllm_cannot_apply_is_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    [mistake] = find_mistakes(save_adapter(tmp_path / "math", **config))
    assert mistake.startswith(message)


@pytest.mark.parametrize(
    "config",
    [
        *({"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"modules_to_save": []}, {"peft_type": None}),
        *({"rank_pattern": {"q_proj": 4}}, {"target_modules": "all-linear"}),
    ],
)
def test_what_vllm_applies_is_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = save_adapter(tmp_path / "math", **config)
    assert find_mistakes(adapter, save_model(tmp_path / "model")) == []


def test_an_adapter_of_another_model_is_named_by_its_first_tensor(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "math")
    assert find_mistakes(adapter, save_model(tmp_path / "wider", width=256)) == [
        "was made for another model: its model.layers.0.self_attn.q_proj has 128 inputs, and the model's has 256"
    ]
    assert find_mistakes(adapter, save_model(tmp_path / "shorter", num_layers=1)) == [
        "was made for another model: this one has no model.layers.1"
    ]


def test_a_layer_of_a_quantized_model_is_there_although_its_shape_says_nothing(tmp_path: Path) -> None:
    model = Path(save_model(tmp_path / "model", num_layers=1))
    packed = {"model.layers.1.self_attn.q_proj.weight": np.zeros((128, 16), np.int32)}
    save_file(packed, model / "model-2.safetensors")
    assert find_mistakes(save_adapter(tmp_path / "math"), str(model)) == []


def test_weights_of_a_higher_rank_than_configured_are_named(tmp_path: Path) -> None:
    [mistake] = find_mistakes(save_adapter(tmp_path / "math", rank=16, r=8))
    assert "has rank 16, but its adapter_config.json gives at most 8" in mistake


def test_all_wrong_adapters_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_adapters({"a": str(tmp_path / "a"), "b": str(save_adapter(tmp_path / "b", use_dora=True))}, "model")
    first, second = caught.value.mistakes
    assert first == f"lora.a={tmp_path / 'a'}: there is no such directory"
    assert second.startswith(f"lora.b={tmp_path / 'b'}: vLLM can't apply")


def test_an_adapter_of_the_hub_is_fetched_once_and_then_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = save_adapter(tmp_path / "snapshots" / "1111"), []

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        calls.append((name, local_files_only))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    check_adapters({"math": "user/math"}, "model")
    assert find_adapter_folders({"math": "user/math"}) == {"math": str(folder)}
    assert calls == [("user/math", False), ("user/math", True)]


def test_a_name_that_the_hub_does_not_know_is_a_mistake_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: object) -> str:
        raise OSError("offline\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"no such directory, and the Hub gives no such repository: offline$"):
        hub.fetch_adapter("user/math", is_cached=False)


@pytest.mark.parametrize(
    ("ranks", "given", "expected"),
    [
        ({"a": 8}, {}, {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8, "max_cpu_loras": 1}),
        ({"a": 1, "b": 65}, {}, {"enable_lora": True, "max_loras": 2, "max_lora_rank": 128, "max_cpu_loras": 2}),
        (
            dict.fromkeys("abcdef", 9),
            {},
            {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16, "max_cpu_loras": 6},
        ),
        (
            {"a": 8},
            {"max_lora_rank": None},
            {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8, "max_cpu_loras": 1},
        ),
        ({"a": 8, "b": 8}, {"max_loras": 1, "enable_lora": True}, {"max_lora_rank": 8, "max_cpu_loras": 2}),
        ({"a": 8, "b": 8}, {"max_cpu_loras": 1, "max_lora_rank": 64}, {"enable_lora": True, "max_loras": 1}),
    ],
)
def test_vllms_options_follow_from_the_adapters_unless_given(
    tmp_path: Path, ranks: dict[str, int], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    folders = {name: str(save_adapter(tmp_path / name, rank=rank)) for name, rank in ranks.items()}
    assert build_adapter_options(folders, given) == expected
    assert choose_num_slots(len(ranks), given) == {**given, **expected}["max_loras"]


def test_a_module_with_a_rank_of_its_own_counts(tmp_path: Path) -> None:
    folders = {"math": str(save_adapter(tmp_path / "math", rank_pattern={"q_proj": 40}))}
    assert build_adapter_options(folders, {})["max_lora_rank"] == 64


def test_given_options_that_do_not_fit_the_adapters_are_rejected(tmp_path: Path) -> None:
    folders = {"a": str(save_adapter(tmp_path / "a")), "b": str(save_adapter(tmp_path / "b", rank=20))}
    with pytest.raises(ConfigError) as caught:
        build_adapter_options(folders, {"enable_lora": False, "max_lora_rank": 16})
    assert caught.value.mistakes == (
        "engine.enable_lora=false contradicts lora: leave it out",
        "engine.max_lora_rank=16: lora.b has rank 20; leave it out, or give at least 32",
    )


@pytest.mark.vllm
def test_an_older_vllm_does_not_apply_an_adapter_without_its_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpgen.engine.vllm import adapters

    @dataclasses.dataclass
    class OlderHelper:
        r: int = 8

        def validate_legal(self, lora_config: object) -> None: ...

        @classmethod
        def from_local_dir(cls, folder: str, max_position_embeddings: None) -> OlderHelper:
            return cls()

    monkeypatch.setattr(adapters, "PEFTHelper", OlderHelper)
    plain = save_adapter(tmp_path / "plain", rank_pattern={}, alpha_pattern={})
    own = save_adapter(tmp_path / "own", alpha_pattern={"q_proj": 4})
    found = adapters.VllmAdapters({"plain": str(plain), "own": str(own)}).find_rejected(None)
    assert list(found) == [f"this version of vLLM ignores alpha_pattern of lora.own={own}"]
