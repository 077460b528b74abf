"""Say which vLLM is installed, where versions differ and dpgen has no part in it (`dpgen.engine.vllm.versions`)."""

from __future__ import annotations

from dpgen.config.environment import read_versions

SINCE_SEEDS = "0.29"  # before, vLLM's CPU build dropped all seeds of a batch with a row that has none


def find_vllm_minor() -> str:
    """Return e.g. "0.32"."""
    return ".".join(read_versions()["vllm"].split(".")[:2])
