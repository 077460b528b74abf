"""Homes of foreign packages: one file each, so that a package's next version breaks code in one place.

- An import counts in functions and TYPE_CHECKING blocks, too, and under any name.
- `torch.distributed.x` after `import torch` counts as an import of torch.distributed.
"""

from __future__ import annotations

import ast

import pytest
from helpers.source_code import find_imports, is_within, list_package_files, read_source

# By package: the files that may import it, and why these.
HOMES = {
    "torch": {
        "dpgen/distributed/gloo/address_book.py": "gloo asks a Store for addresses",
        "dpgen/distributed/gloo/rank_group.py": "gloo exchanges tensors",
        "dpgen/distributed/gloo/torch_world.py": "sets torch.distributed up",
        "dpgen/engine/lockstep.py": "the engine processes of one group exchange tensors",
        "dpgen/engine/vllm/engine_config.py": "run.json records torch's version next to vLLM's",
    },
    "torch.distributed": {
        "dpgen/distributed/gloo/address_book.py": "gloo asks a Store for addresses",
        "dpgen/distributed/gloo/rank_group.py": "the group of all ranks",
        "dpgen/distributed/gloo/torch_world.py": "joins and leaves torch.distributed's world",
        "dpgen/engine/lockstep.py": "engine processes that step together: a group of their own, apart from the ranks'",
    },
    "vllm": {
        "dpgen/engine/parsing/request_parsers.py": "vLLM's parsers, as its server makes them for a request",
        "dpgen/engine/parsing/vllm_parsers.py": "vLLM's reasoning and tool parsers, in a worker process",
        "dpgen/engine/vllm/adapters.py": "vLLM's requests for LoRA adapters, and its check of their configurations",
        "dpgen/engine/vllm/default_options.py": "vLLM's own default of an option",
        "dpgen/engine/vllm/engine_config.py": "vLLM's configuration",
        "dpgen/engine/vllm/executors.py": "vLLM's executors, which drive the devices",
        "dpgen/engine/vllm/hooks/hot_path.py": "vLLM's kinds of outputs, of which a batch job needs one",
        "dpgen/engine/vllm/media/connector.py": "what vLLM's renderer loads media with",
        "dpgen/engine/vllm/media/features.py": "vLLM's form of processed media, and its prompts",
        "dpgen/engine/vllm/media/processing.py": "vLLM's renderer with the model's processor of media",
        "dpgen/engine/vllm/media/requirements.py": "vLLM's registry of the models' processors",
        "dpgen/engine/vllm/pooling.py": "vLLM's parameters and outputs of pooling models",
        "dpgen/engine/vllm/reasoning.py": "vLLM's tokenizer, to choose a reasoning parser for the engine",
        "dpgen/engine/vllm/sampling_check.py": "vLLM's check of sampling and of grammars",
        "dpgen/engine/vllm/server_requests.py": "vLLM's classes of its server's requests",
        "dpgen/engine/vllm/vllm_backend.py": "vLLM's engine",
        "dpgen/engine/vllm/vllm_render.py": "vLLM's renderer, for tokenizers that only vLLM knows",
    },
    "datasets": {
        "dpgen/api/calls.py": "the type of what it returns",
        "dpgen/api/session.py": "the type of what it returns",
        "dpgen/data/input_loading.py": "loads all input",
        "dpgen/data/input_rows.py": "reads all input",
        "dpgen/data/saved_dataset.py": "writes its dataset cards and folders",
    },
    "fsspec": {"dpgen/data/storage/store.py": "opens all stores"},
    "omegaconf": {"dpgen/config/loader.py": "merges files and overrides"},
}


def find_uses(source: str, path: str, package: str) -> list[int]:
    """Return the lines of a file that import a package, or reach into it through a package above it."""
    imports = find_imports(source, path)
    meanings = {imported.name: imported.meaning for imported in imports}
    lines = {imported.line for imported in imports if is_within(imported.target, package)}
    if not any(is_within(package, name) or is_within(name, package) for name in meanings.values()):
        return sorted(lines)  # no name of the file reaches into the package
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            root, _, attributes = ast.unparse(node).partition(".")
            if root in meanings and is_within(f"{meanings[root]}.{attributes}", package):
                lines.add(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize("package", HOMES)
def test_each_heavy_package_has_one_home(package: str) -> None:
    uses = {path: lines for path in list_package_files() if (lines := find_uses(read_source(path), path, package))}
    misplaced = [f"{path}:{line}" for path in uses.keys() - HOMES[package].keys() for line in uses[path]]
    assert not misplaced, f"{package} is imported outside its home"
    assert uses.keys() == HOMES[package].keys(), f"HOMES lists a home of {package} that no longer imports it"


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "import os, torch.distributed.elastic",
        "from torch import distributed",
        "from torch import nn, distributed as dist",
        "from torch.distributed import distributed_c10d as c10d",
        "from torch.distributed.elastic.multiprocessing import errors",
        "def f():\n    import torch.distributed as dist",
        "if TYPE_CHECKING:\n    from torch.distributed import Store",
        "try:\n    pass\nexcept ImportError:\n    import torch.distributed",
        "class A:\n    from torch import distributed",
        "import torch\ntorch.distributed.barrier()",
        "import torch as t\nt.distributed",
        "import torch.nn\nrank = torch.distributed.get_rank()",
        "import importlib\nimportlib.import_module('torch.distributed')",
        "__import__('torch.distributed')",
    ],
)
def test_each_spelling_of_an_import_is_found_with_its_line(source: str) -> None:
    assert find_uses(source, "dpgen/run.py", "torch.distributed") == [source.count("\n") + 1], "the last line"


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import torch.nn as distributed",
        "from dpgen import distributed",
        "from . import distributed",
        "from torchvision import distributed",
        "torch = open_box()\ntorch.distributed",
        "# import torch.distributed",
        "text = 'import torch.distributed'",
    ],
)
def test_text_that_only_looks_like_an_import_is_not_counted(source: str) -> None:
    assert find_uses(source, "dpgen/run.py", "torch.distributed") == []
