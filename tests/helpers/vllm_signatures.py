"""Read which names, fields and parameters of vLLM dpgen uses, in vLLM's source and without importing it.

    python tests/helpers/vllm_signatures.py 0.33=vllm-0.33.0-....whl 0.32=.venv/lib/python3.11/site-packages ...

writes tests/golden/vllm_signatures.json anew. Each source is a wheel, for a GPU or not, or a folder that holds `vllm`.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
RECORD = REPO / "tests" / "golden" / "vllm_signatures.json"
FIELDS = {
    "EngineArgs": "vllm/engine/arg_utils.py",
    "SamplingParams": "vllm/sampling_params.py",
    "StructuredOutputsParams": "vllm/sampling_params.py",
}
# What dpgen calls or overrides: file → name → (positional arguments after self, keywords).
CALLS: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
    "vllm/engine/arg_utils.py": {"EngineArgs.create_engine_config": (1, ())},
    "vllm/v1/engine/llm_engine.py": {
        "LLMEngine.__init__": (0, ("vllm_config", "executor_class", "log_stats", "usage_context")),
        "LLMEngine.add_request": (3, ("lora_request",)),
        "LLMEngine.abort_request": (1, ()),
        "LLMEngine.add_lora": (1, ()),
        "LLMEngine.step": (0, ()),
        "LLMEngine.has_unfinished_requests": (0, ()),
    },
    "vllm/v1/executor/abstract.py": {
        "Executor.determine_available_memory": (0, ()),
        "Executor.shutdown": (0, ()),
    },
    "vllm/v1/executor/uniproc_executor.py": {"ExecutorWithExternalLauncher._distributed_args": (0, ())},
    "vllm/v1/executor/multiproc_executor.py": {"MultiprocExecutor.shutdown": (0, ())},
    "vllm/v1/core/sched/scheduler.py": {"Scheduler.get_request_counts": (0, ())},
    "vllm/inputs/engine.py": {"tokens_input": (1, ()), "mm_input": (4, ())},
    "vllm/renderers/base.py": {
        "BaseRenderer.render_chat": (3, ("skip_mm_cache",)),
        "BaseRenderer.render_cmpl": (2, ("skip_mm_cache",)),
    },
    "vllm/multimodal/registry.py": {"MultiModalRegistry.create_processor": (1, ())},
    "vllm/multimodal/media/connector.py": {
        "MediaConnector.__init__": (0, ("media_io_kwargs",)),
        "MediaConnector.load_from_url": (2, ("fetch_timeout",)),
        "MediaConnector.fetch_image": (1, ()),
        "MediaConnector.fetch_audio": (1, ()),
        "MediaConnector.fetch_video": (1, ()),
    },
    "vllm/config/model.py": {"ModelConfig.get_diff_sampling_param": (0, ()), "ModelConfig.get_vocab_size": (0, ())},
    "vllm/config/vllm.py": {"VllmConfig.use_v2_model_runner": (0, ())},
    "vllm/lora/peft_helper.py": {"PEFTHelper.from_local_dir": (2, ()), "PEFTHelper.validate_legal": (1, ())},
}

ReadFn = Callable[[str], str | None]


def open_source(path: Path) -> ReadFn:
    """Return a function that reads a file of vLLM's source, or None where there is no such file."""
    if path.is_dir():
        return lambda name: (path / name).read_text(encoding="utf-8") if (path / name).is_file() else None
    wheel = zipfile.ZipFile(path)
    names = set(wheel.namelist())
    return lambda name: wheel.read(name).decode() if name in names else None


def list_imports() -> list[str]:
    """Return what dpgen imports of vLLM, as "vllm.config:VllmConfig"."""
    found = set()
    for path in (REPO / "dpgen").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return sorted(found)


def read_signatures(read: ReadFn) -> dict[str, Any]:
    """Return the facts of one version: `missing` imports, `calls` with their parameters, and `fields`."""
    return {
        "missing": [name for name in list_imports() if not _has(read, name)],
        "calls": {name: _read_parameters(read(path), name) for path, names in CALLS.items() for name in names},
        "fields": {name: sorted(_read_fields(read(path), name)) for name, path in FIELDS.items()},
    }


def accepts(parameters: list[str] | None, num_positional: int, keywords: tuple[str, ...]) -> bool:
    """Return True if a function with these parameters, as the record has them, takes such a call."""
    if parameters is None:
        return False
    names = [parameter.rstrip("=") for parameter in parameters]
    needed = {name for name in parameters if name[-1] != "=" and name[0] != "*"} - set(names[:num_positional])
    has_room = num_positional <= len(names) or any(name.startswith("*") for name in names)
    return has_room and needed <= set(keywords) and set(keywords) <= set(names[num_positional:])


def merge(versions: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the record of several versions: of fields those that some version lacks, each with those that have it."""
    fields: dict[str, dict[str, list[str]]] = {}
    for name in FIELDS:
        everywhere = {field for facts in versions.values() for field in facts["fields"][name]}
        having = {
            field: [version for version, facts in versions.items() if field in facts["fields"][name]]
            for field in sorted(everywhere)
        }
        fields[name] = {field: having[field] for field in having if len(having[field]) < len(versions)}
    return {
        "versions": list(versions),
        "imports": list_imports(),
        "missing": {version: facts["missing"] for version, facts in versions.items()},
        "calls": {path: _merge_calls(path, versions) for names in CALLS.values() for path in names},
        "changed_fields": fields,
    }


def _merge_calls(name: str, versions: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return the versions with each list of parameters, which stand in one text; "-" for no such function."""
    merged: dict[str, list[str]] = {}
    for version, facts in versions.items():
        parameters = facts["calls"][name]
        merged.setdefault("-" if parameters is None else " ".join(parameters), []).append(version)
    return merged


def _has(read: ReadFn, imported: str) -> bool:
    module, _, name = imported.partition(":")
    path = module.replace(".", "/")
    if read(f"{path}/{name}.py") is not None or read(f"{path}/{name}/__init__.py") is not None:
        return True
    text = read(f"{path}.py") or read(f"{path}/__init__.py")
    return text is not None and name in set(_iter_names(ast.parse(text)))


def _iter_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines or imports, also lazily, as its `__all__` tells."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _find(text: str | None, dotted: str) -> Any:
    body: list[ast.stmt] = [] if text is None else ast.parse(text).body
    node: Any = None
    for part in dotted.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        node = next((item for item in body if isinstance(item, kinds) and item.name == part), None)
        if node is None:
            return None
        body = node.body
    return node


def _read_parameters(text: str | None, name: str) -> list[str] | None:
    """Return parameters without `self`, those with a default with "=" behind; None if there is no such function."""
    node = _find(text, name)
    if node is None:
        return None
    given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    num_needed = len(given) - len(node.args.defaults)
    parameters = [f"{argument}=" if place >= num_needed else argument for place, argument in enumerate(given)]
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        parameters.append(argument.arg if default is None else f"{argument.arg}=")
    parameters += [f"*{argument.arg}" for argument in (node.args.vararg, node.args.kwarg) if argument]
    return parameters[1:] if "." in name else parameters


def _read_fields(text: str | None, name: str) -> set[str]:
    node = _find(text, name)
    items = node.body if node is not None else []
    return {item.target.id for item in items if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}


if __name__ == "__main__":
    sources = dict(argument.split("=", 1) for argument in sys.argv[1:])
    facts = {version: read_signatures(open_source(Path(sources[version]))) for version in sorted(sources)}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in merge(facts).items())
    RECORD.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
