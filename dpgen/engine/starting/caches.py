"""Tell whether loading would fill caches that the ranks of a node share: of weights, and of compiled code.

Limits: vLLM writes its list of compiled code in place. A rank that reads half of it while another one writes does not
start, and is started again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpgen.config.schema import Config
from dpgen.engine.starting.cores import count_own_cores
from dpgen.engine.starting.model_damage import has_weights

# Four ranks with 16 cores each compiled a model of 8 billion parameters in 51 s all at once, and in 60 s one before the
# others (benchmarks/README.md).
_COMPILE_CORES = 16


def has_cold_caches(config: Config, environ: Mapping[str, str], local_size: int) -> bool:
    """Return True if the node's ranks had better wait until one of them has filled a cache that they share.

    One downloads the weights for all. Compiled code is shared as well, but with `_COMPILE_CORES` each, all ranks
    compile it at the same time as fast as one does.

    Args:
        local_size: ranks on this node.
    """
    if config.run.engine != "vllm":
        return False
    if not has_weights(config.model, config.engine):
        return True
    compiles = keeps_compiled_code(config.engine, environ) and not _is_populated(find_compile_cache(environ))
    return compiles and count_own_cores(local_size) < _COMPILE_CORES


def keeps_compiled_code(options: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Return True unless vLLM compiles nothing, or keeps nothing of it: then a cache stays empty at every start.

    Args:
        options: fields of EngineArgs.
    """
    compilation = options.get("compilation_config")
    mode = compilation.get("mode") if isinstance(compilation, Mapping) else None
    is_eager = bool(options.get("enforce_eager")) or options.get("optimization_level") in (0, "0", "O0")
    return not is_eager and mode not in (0, "0", "NONE") and environ.get("VLLM_DISABLE_COMPILE_CACHE", "0") == "0"


def find_compile_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder in which vLLM keeps compiled code."""
    root = environ.get("VLLM_CACHE_ROOT") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "vllm")
    return Path(os.path.expanduser(root)) / "torch_compile_cache"  # "~" stays where a user has no home, as in vLLM


def _is_populated(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
