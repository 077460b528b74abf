"""Give vLLM a run's LoRA adapters: the engine's options, and the `LoRARequest` of a row.

- An adapter's number comes from its place among the sorted names, so it is the same in all processes of an engine.
- All adapters are loaded once before the first row: vLLM would load one at its first row, and die of what is wrong.
- Limits: in vLLM 0.32's build for the CPU, rows without an adapter get the adapter of the last slot (index -1 in
  `lora/ops/torch_ops/lora_ops.py`). dpgen keeps that slot empty.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from dpgen.engine.adapters import build_adapter_options
from dpgen.errors import ConfigError
from dpgen.formatting import format_count

# Fields of an adapter's configuration that older versions of vLLM ignore, and so apply the adapter wrongly.
_PATTERNS = ("rank_pattern", "alpha_pattern")


class VllmAdapters:
    """Hold the adapters that rows may name.

    Args:
        folders: name → absolute path.
    """

    def __init__(self, folders: Mapping[str, str]) -> None:
        self._folders = folders
        self._requests = {
            name: LoRARequest(name, number, folders[name]) for number, name in enumerate(sorted(folders), 1)
        }

    def get_request(self, name: str | None) -> LoRARequest | None:
        """Return what tells vLLM a row's adapter; None for a row without one."""
        return None if name is None else self._requests[name]

    def add_options(self, options: dict[str, Any]) -> list[str]:
        """Add the fields of EngineArgs that the adapters need, and return notes for the log.

        Raises:
            ConfigError: a field that the user has given does not fit the adapters.
        """
        if not self._folders:
            return []
        given, num_slots = options.get("max_loras"), len(self._folders) + 1
        options |= build_adapter_options(self._folders, options)
        if not current_platform.is_cpu():
            return [f"LoRA: {self._describe(options)}"]
        reason = "because rows without an adapter would get that of the last slot"
        if given is not None and int(given) < num_slots:
            raise ConfigError(
                f"engine.max_loras={given}: vLLM on the CPU needs {num_slots}, one more than adapters, {reason}"
            )
        if given is None:
            options["max_loras"] = num_slots
            options["max_cpu_loras"] = max(num_slots, options["max_cpu_loras"])
        return [f"vLLM on the CPU: {self._describe(options)}: one slot more than adapters, {reason}"]

    def check_prompt_logprobs(self) -> None:
        """Raise ValueError if log-probabilities of a prompt, or of a given completion, would kill the engine.

        vLLM 0.32 on the CPU fails in `add_lora_logits`, where the logits of a whole prompt meet one row per sequence.
        """
        if self._folders and current_platform.is_cpu():
            raise ValueError("prompt_logprobs: vLLM on the CPU can't compute a prompt's log-probabilities with lora")

    def _describe(self, options: Mapping[str, Any]) -> str:
        adapters = format_count(len(self._folders), "adapter")
        return f"{adapters}, max_lora_rank={options['max_lora_rank']}, max_loras={options['max_loras']}"

    def find_rejected(self, lora_config: Any) -> Iterator[str]:
        """Yield a line for each adapter whose configuration vLLM rejects.

        Args:
            lora_config: vLLM's `LoRAConfig`.
        """
        known = {field.name for field in dataclasses.fields(PEFTHelper)}
        for name, folder in self._folders.items():
            try:
                helper = PEFTHelper.from_local_dir(folder, None)
                helper.validate_legal(lora_config)
            except Exception as error:  # noqa: BLE001 - vLLM's errors have no common base
                yield f"vLLM rejects lora.{name}={folder}: {_summarize(error)}"
                continue
            config = json.loads((Path(folder) / "adapter_config.json").read_bytes())
            if ignored := [key for key in _PATTERNS if config.get(key) and key not in known]:
                yield f"this version of vLLM ignores {', '.join(ignored)} of lora.{name}={folder}"

    def load_all(self, engine: Any) -> None:
        """Load each adapter once.

        Args:
            engine: vLLM's `LLMEngine`.

        Raises:
            ConfigError: vLLM can't load one.
        """
        for name, request in self._requests.items():
            try:
                engine.add_lora(request)
            except Exception as error:
                raise ConfigError(f"vLLM can't load lora.{name}={request.lora_path}: {_summarize(error)}") from error


def _summarize(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
