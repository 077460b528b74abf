"""List the rows of gpu.py's table: what each runs, on how many GPUs, and which row it is compared with.

The first rows are the most important ones: a time budget leaves out the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dpgen.config.sections import ParallelConfig

Way = Literal["generate", "dpgen", "profile"]
WAVES_6, WAVES_16 = 1_500, 4_000  # rows a rank, of 256 sequences
_LONGEST = {"chat": 2_048, "reasoning": 3_500}
_START_S = 32.0
# Tokens a second on one H100 or H200, to estimate how long a row takes.
_USUAL_RATE = {"1b": 33_000, "8b": 16_500}
_MEAN_TOKENS = {"chat": 262, "reasoning": 310}
HAS_ENGINES_PER_RANK = hasattr(ParallelConfig, "engines_per_rank")


@dataclass(frozen=True)
class BenchmarkRow:
    """Describe one row of the table.

    Attributes:
        name: for `--only`; begins with the size.
        title: the table's first column.
        num_rows: rows of the dataset.
        ranks: processes of torchrun.
        gpus: GPUs that they use.
        base: the row whose tokens/s this one's are divided by.
        base_factor: how many of these would be ideal; the number of GPUs, mostly.
        settings: further key=value of dpgen.
        engine: engine options that differ from those of all rows.
        death: what is killed in the middle.
        has_cold_caches: begin without compiled code.
    """

    name: str
    title: str = ""
    way: Way = "dpgen"
    workload: str = "chat"
    num_rows: int = WAVES_16
    is_sorted: bool = False
    ranks: int = 1
    gpus: int = 1
    base: str | None = None
    base_factor: int = 1
    settings: tuple[str, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    has_mps: bool = False
    has_seeds: bool = True
    death: Literal["engine", "rank"] | None = None
    has_cold_caches: bool = False

    @property
    def size(self) -> str:
        return self.name.partition("-")[0]

    @property
    def longest(self) -> int:
        return _LONGEST[self.workload]

    def estimate_s(self) -> float:
        """Return about how many seconds the row takes, start-up included."""
        if self.way == "profile":
            return _START_S + 15
        tokens = self.num_rows * _MEAN_TOKENS[self.workload]
        restart_s = {None: 0, "engine": 25, "rank": 70}[self.death]
        return _START_S + restart_s + 25 * self.has_cold_caches + tokens / _USUAL_RATE[self.size] / self.gpus


def list_rows(num_gpus: int, scale: float = 1.0) -> list[BenchmarkRow]:
    """Return all rows for this number of GPUs; `scale` multiplies the rows of each dataset."""
    rows = [*_list_small(num_gpus), *_list_large(num_gpus)]
    return [_scale(row, scale) for row in rows]


def _list_small(num_gpus: int) -> Iterator[BenchmarkRow]:
    """Yield the rows of 1 billion parameters, where the processor is the limit."""
    count = 10_000  # further engines join while the first one generates, so a short job shows little of them
    base = "1b-generate"
    yield BenchmarkRow(base, "`LLM.generate()`", "generate", num_rows=count)
    if HAS_ENGINES_PER_RANK:
        yield BenchmarkRow("1b-dpgen", "dpgen, nothing set by hand", num_rows=count, base=base)
    for number in (1, 3, 2, 4):
        yield _make_engines_row(number, count, has_mps=False)
        if number == 3:
            yield _make_engines_row(number, count, has_mps=True)
    yield BenchmarkRow("1b-profile", "a step, 256 sequences", "profile")
    long = 4 * count
    yield BenchmarkRow("1b-generate-long", f"`LLM.generate()`, {long:,} rows", "generate", num_rows=long)
    yield BenchmarkRow(
        "1b-dpgen-long", f"dpgen, nothing set by hand, {long:,} rows", num_rows=long, base="1b-generate-long"
    )
    yield BenchmarkRow("1b-profile-no-seeds", "a step, 256 sequences, no seeds", "profile", has_seeds=False)
    if num_gpus > 1:
        yield BenchmarkRow(
            "1b-ranks",
            f"dpgen, {num_gpus} ranks, nothing set by hand",
            num_rows=count * num_gpus,
            ranks=num_gpus,
            gpus=num_gpus,
            base="1b-dpgen" if HAS_ENGINES_PER_RANK else "1b-engines-1",
            base_factor=num_gpus,
        )
        yield BenchmarkRow(
            "1b-cold", "dpgen, one rank, no compiled code at the start", num_rows=count // 4, has_cold_caches=True
        )
        yield BenchmarkRow(
            "1b-ranks-cold",
            f"dpgen, {num_gpus} ranks, no compiled code at the start",
            num_rows=count * num_gpus // 4,
            ranks=num_gpus,
            gpus=num_gpus,
            has_cold_caches=True,
        )


def _make_engines_row(number: int, count: int, *, has_mps: bool) -> BenchmarkRow:
    """Return the row of several engines on a GPU: those of one rank, or of ranks that share it in older versions."""
    if HAS_ENGINES_PER_RANK:
        ranks, settings = 1, (f"parallel.engines_per_rank={number}",)
    else:
        ranks, settings = number, ("parallel.share_devices=true",)
    return BenchmarkRow(
        f"1b-engines-{number}{'-mps' if has_mps else ''}",
        f"{number} engine{'' if number == 1 else 's'} on the GPU{', with NVIDIA MPS' if has_mps else ''}",
        num_rows=count,
        ranks=ranks,
        base="1b-generate",
        settings=settings,
        engine={"max_num_seqs": 192} if number == 4 else {},
        has_mps=has_mps,
    )


def _list_large(num_gpus: int) -> Iterator[BenchmarkRow]:
    """Yield the rows of 8 billion parameters, where the GPU is the limit."""
    base, alone = "8b-generate", "8b-dpgen"
    yield BenchmarkRow(base, f"`LLM.generate()`, {WAVES_16:,} rows", "generate")
    yield BenchmarkRow(alone, f"dpgen, one rank, {WAVES_16:,} rows", base=base)
    if num_gpus > 1:
        yield from _list_ranks(num_gpus, alone)
    yield BenchmarkRow("8b-profile", "a step, 256 sequences", "profile")
    yield BenchmarkRow("8b-generate-6-waves", f"`LLM.generate()`, {WAVES_6:,} rows", "generate", num_rows=WAVES_6)
    yield BenchmarkRow(
        "8b-dpgen-6-waves", f"dpgen, one rank, {WAVES_6:,} rows", num_rows=WAVES_6, base="8b-generate-6-waves"
    )
    yield BenchmarkRow(
        "8b-engine-killed", "dpgen, one rank, its engine killed in the middle", base=alone, death="engine"
    )
    yield BenchmarkRow("8b-dataset-order", "dpgen, `work.order=dataset`", base=base, settings=("work.order=dataset",))
    yield BenchmarkRow("8b-no-seeds", "dpgen, no seeds", base=alone, settings=("run.seed=null",))
    for sequences in (512, 1_024):
        engine = {"max_num_seqs": sequences}
        yield BenchmarkRow(f"8b-sequences-{sequences}", f"dpgen, {sequences:,} sequences", base=alone, engine=engine)
    yield BenchmarkRow(
        "8b-generate-1024", "`LLM.generate()`, 1,024 sequences", "generate", engine={"max_num_seqs": 1_024}, base=base
    )
    share = ("parallel.share_devices=true",)
    yield BenchmarkRow("8b-shared", "two ranks on one GPU", ranks=2, base=alone, settings=share)
    reasoning: dict[str, Any] = {"workload": "reasoning", "num_rows": WAVES_6}
    yield BenchmarkRow("8b-reasoning-generate", "`LLM.generate()`, reasoning-like", "generate", **reasoning)
    yield BenchmarkRow("8b-reasoning", "dpgen, one rank, reasoning-like", base="8b-reasoning-generate", **reasoning)
    yield BenchmarkRow("8b-profile-no-seeds", "a step, 256 sequences, no seeds", "profile", has_seeds=False)
    yield BenchmarkRow("8b-profile-512", "a step, 512 sequences", "profile", engine={"max_num_seqs": 512})


def _list_ranks(num_gpus: int, alone: str) -> Iterator[BenchmarkRow]:
    """Yield the rows of a rank on each GPU: 16 and 6 waves, shuffled and sorted, and what a death costs there."""
    for waves, rows_per_rank in ((16, WAVES_16), (6, WAVES_6)):
        for workload, is_sorted in (("chat", False), ("reasoning", False), ("chat", True), ("reasoning", True)):
            words = [f"dpgen, {num_gpus} ranks, {rows_per_rank * num_gpus:,} rows ({waves} waves)"]
            words += ["reasoning-like"] * (workload == "reasoning") + ["sorted by length"] * is_sorted
            yield BenchmarkRow(
                "-".join(["8b-ranks", str(waves), workload, *(["sorted"] * is_sorted)]),
                ", ".join(words),
                workload=workload,
                num_rows=rows_per_rank * num_gpus,
                is_sorted=is_sorted,
                ranks=num_gpus,
                gpus=num_gpus,
                base=alone if workload == "chat" else "8b-reasoning",
                base_factor=num_gpus,
            )
    for death in ("engine", "rank"):
        yield BenchmarkRow(
            f"8b-ranks-{death}-killed",
            f"dpgen, {num_gpus} ranks, 16 waves, one {death} killed in the middle"
            + (" (as srun starts ranks)" if death == "rank" else ""),
            num_rows=WAVES_16 * num_gpus,
            ranks=num_gpus,
            gpus=num_gpus,
            base="8b-ranks-16-chat",
            death=death,
        )


def _scale(row: BenchmarkRow, scale: float) -> BenchmarkRow:
    if scale == 1:
        return row
    return replace(row, num_rows=max(row.ranks, round(row.num_rows * scale)), title=f"{row.title}, rows x {scale:g}")
