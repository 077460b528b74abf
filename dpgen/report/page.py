"""Render the facts of a run as one HTML page.

- Everything that a run brings along (answers, prompts, errors, names) is hostile: it is escaped for HTML by the
  template engine, and control characters and marks that change the direction of text become visible escapes.
- The page has no script. Its policy allows one style sheet, by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpgen.config.secrets import redact_text
from dpgen.formatting import escape_text, format_count, format_duration, format_ranges
from dpgen.journal.run_identity import find_other_settings
from dpgen.report import charts
from dpgen.report.distributions import describe_latencies, describe_lengths
from dpgen.report.facts import ReportFacts, to_json
from dpgen.report.numbers import format_number, format_percent, format_seconds
from dpgen.report.sections import (
    describe_errors,
    describe_rows,
    describe_spending,
    describe_throughput,
    describe_timeline,
    list_ranks,
    list_tiles,
)

MAX_BYTES = 1_000_000
_MAX_TEXT_CHARS = 1_200
_MAX_LINE_CHARS = 600
_MAX_EXAMPLE_CHARS = 240
_STATES = {
    "finished": "finished",
    "stopped": "stopped, resumable",
    "failed": "failed",
    "dead": "dead, resumable",
    "live": "live",
    "starting": "starting",
    "checking": "live or dead: not known yet",
    "unknown": "state unknown",
}


def render_page(facts: ReportFacts) -> str:
    """Return the page as HTML of less than `MAX_BYTES`."""
    for max_chars in (_MAX_TEXT_CHARS, 300, 60):
        page = _render(facts, max_chars)
        if len(page.encode("utf-8")) < MAX_BYTES:
            return page
    return _render(facts, 0)


def _render(facts: ReportFacts, max_chars: int) -> str:
    environment = Environment(
        loader=PackageLoader("dpgen.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "foreign": lambda text: _clean(text, max_chars or 60),
        "config": lambda text: escape_text(text, keep="\n\t"),
        "line": lambda text: _shorten(escape_text(redact_text(str(text)[:_MAX_LINE_CHARS])), _MAX_LINE_CHARS),
        "example": lambda text: _shorten(escape_text(redact_text(text[:_MAX_LINE_CHARS])), _MAX_EXAMPLE_CHARS),
        "number": format_number,
        "percent": format_percent,
        "seconds": format_seconds,
        "duration": format_duration,
        "count": format_count,
    }
    style = (files("dpgen.report") / "report.css.jinja").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("report.html.jinja").render(
        style=Markup(style),
        style_hash=digest,
        has_texts=max_chars > 0,
        **_make_context(facts),
    )


def _make_context(facts: ReportFacts) -> dict[str, Any]:
    statistics = facts.journal.statistics
    return {
        "facts": facts,
        "title": facts.path.resolve().name or "run",
        "state": _STATES[facts.state],
        "is_whole": facts.state == "finished",
        "created": time.strftime("%Y-%m-%d %H:%M %Z"),
        "model": str(_get(facts.metadata, "identity", "model") or ""),
        "tiles": list_tiles(facts),
        "throughput": describe_throughput(facts),
        "timeline": describe_timeline(facts),
        "spending": describe_spending(facts),
        "lengths": describe_lengths(statistics.lengths),
        "prompt_lengths": describe_lengths(statistics.prompt_lengths),
        "latencies": describe_latencies(facts.latencies),
        "errors": describe_errors(facts),
        "rows": describe_rows(facts),
        "ranks": list_ranks(facts),
        "duplicates": statistics.list_duplicates(),
        "num_duplicates": sum(number - 1 for number in statistics.copies.values()),
        "versions": _list_versions(facts.metadata),
        "identity": _list_identity(facts.metadata),
        "draw_histogram": charts.draw_histogram,
    }


def _clean(text: str, max_chars: int) -> str:
    """Return foreign text for a page, cut to a length that fits it."""
    cut = text if len(text) <= max_chars else f"{text[:max_chars]} … ({len(text) - max_chars:,} characters more)"
    return escape_text(redact_text(cut), keep="\n\t")


def _shorten(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[:max_chars]} …"


def _list_versions(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions: dict[str, str] = {}
    recorded = metadata.get("versions")
    if isinstance(recorded, Mapping):
        for part in recorded.values():
            versions |= {str(k): str(v) for k, v in part.items()} if isinstance(part, Mapping) else {}
    engine = _get(metadata, "engine", "versions")
    if isinstance(engine, Mapping):
        versions |= {str(key): str(value) for key, value in engine.items()}
    with contextlib.suppress(PackageNotFoundError):
        versions["this page: dpgen"] = version("dpgen")
    return list(versions.items())


def _list_identity(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the run is, in short; the whole is in the configuration."""
    identity, engine = metadata.get("identity"), metadata.get("engine")
    identity = identity if isinstance(identity, Mapping) else {}
    engine = engine if isinstance(engine, Mapping) else {}
    input = identity.get("input")
    content = input.get("content") if isinstance(input, Mapping) else None
    others = find_other_settings(metadata, range(1, int(metadata.get("attempt") or 0)))
    facts = {
        "model": identity.get("model"),
        "input's hash": content,
        "sampling": to_json(identity["sampling"]) if identity.get("sampling") else None,
        "seed": identity.get("seed"),
        "device": engine.get("device"),
        "sequences at a time": engine.get("max_num_seqs"),
        "engines a rank": _get(metadata, "engines_per_rank", "number"),
        "longest sequence": engine.get("max_model_len"),
        "ranks": metadata.get("dp_size"),
        "attempts": metadata.get("attempt"),
        **{f"other settings of attempt {format_ranges(np.array(group))}": "; ".join(lines) for group, lines in others},
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
