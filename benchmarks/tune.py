"""Let the search of `dpgen tune` choose the settings of engines in virtual time, and compare with a sweep.

    python benchmarks/tune.py [--rows 100000] [--start-s SECONDS] [--json]

An engine's step takes as long as a formula says that is fitted to what was measured on H100 and H200
(`MEASURED`, in tokens/s): its processor's part, which engines on a GPU have apart, and its kernels, which they share.
A trial runs the search, the climb and the meter of dpgen over such engines, row by row, with noise on each rate. The
sweep is exact: 20 points, 1 to 4 engines on the GPU and 64 to 1,024 sequences for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpgen.simulation.lengths import sample_lengths
from dpgen.tuning.climb import Climb
from dpgen.tuning.meter import Sample
from dpgen.tuning.search import Search
from dpgen.tuning.space import ENGINES_PER_RANK, MAX_NUM_SEQS, Candidate
from dpgen.tuning.trial import Budget, TrialPlan, TrialResult

SWEEP_ENGINES, SWEEP_SEQS = (1, 2, 3, 4), (64, 128, 256, 512, 1024)
DEFAULT_SEQS = 1024  # of vLLM on these GPUs
NOISE = 0.01  # standard deviation of a measured rate over the true one
SAMPLE_S = 1.0
FILL_S = 2.0  # for which the first engine runs all sequences that it can, with `parallel.engines_per_rank=auto`
# Tokens/s of chat-like rows: (engines on the GPU, sequences of each) → measured.
MEASURED = {
    "1 billion": {(1, 256): 35_656, (2, 256): 54_815, (3, 256): 59_520, (4, 192): 56_901},
    "8 billion": {
        **{(1, 256): 19_800, (1, 512): 20_476, (1, 1024): 18_885},
        **{(2, 256): 18_130, (2, 512): 19_190},
    },
}


@dataclass(frozen=True)
class Model:
    """Hold what a step takes, in ms, fitted to `MEASURED`.

    Attributes:
        processor, kernels: coefficients of 1, b, b² for b sequences.
        per_engine: for each engine beyond the first on a GPU.
        sharpness: 1 if the two parts follow each other, large if the longer hides the shorter.
        kv_ns: nanoseconds for each token in the KV cache beyond those of chat-like rows.
        prefill_us: microseconds for each prompt token beyond those of chat-like rows.
        num_kv_tokens: that the GPU holds.
        start_s: from the start of a trial to its first rows.
        num_engines: what parallel.engines_per_rank=auto takes: processor time over kernel time, at most 4.
    """

    processor: tuple[float, float]
    kernels: tuple[float, float, float]
    per_engine: float
    sharpness: float
    kv_ns: float
    prefill_us: float
    num_kv_tokens: int
    start_s: float
    num_engines: int


# Starts: engine's options 5.4 s, KV cache and graphs 3.5 s, weights 6.2 s for 8 billion parameters, and a tenth more.
MODELS = {
    "1 billion": Model(
        (1.009, 0.02272), (0.988, 0.006082, 1.4144e-5), 0.808, 2.81, 16, 8, 2_000_000, 11.5, num_engines=3
    ),
    "8 billion": Model((1.0, 0.02295), (3.774, 0.03181, 1.7747e-5), 2.504, 8.0, 64, 45, 800_000, 16.6, num_engines=1),
}


@dataclass(frozen=True)
class Workload:
    """Describe rows.

    Attributes:
        lengths: generated tokens, as `sample_lengths` takes them.
        max_tokens: of a row.
        prompt_tokens: of each row; those of chat-like rows are part of what was measured.
    """

    lengths: str
    max_tokens: int
    prompt_tokens: int

    def sample(self, num_rows: int, seed: int) -> np.ndarray:
        """Return the generated tokens of rows, int64[num_rows]."""
        lengths: np.ndarray = np.minimum(sample_lengths(self.lengths, num_rows, seed), self.max_tokens)
        return lengths


_CHAT_PROMPT = 300
WORKLOADS = {
    "chat-like": Workload("lognormal:200:0.72", 2_002, _CHAT_PROMPT),
    "reasoning-like": Workload(str(Path(__file__).parent / "reasoning_output_lengths.json"), 3_500, _CHAT_PROMPT),
    "prefill-heavy": Workload("lognormal:48:0.5", 200, 2_000),
}


class Engines:
    """Step k engines on one GPU with rows of a workload, in virtual time."""

    def __init__(self, model: Model, workload: Workload, num_engines: int, seed: int = 0) -> None:
        self.model, self.workload, self.num_engines = model, workload, num_engines
        self._lengths = workload.sample(200_000, seed)
        self._next = 0
        # Of each row in the engines: tokens still to generate, and tokens in the KV cache.
        self._left, self._context = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.now_s, self.num_tokens, self.num_rows, self.num_preemptions = 0.0, 0, 0, 0
        chat = WORKLOADS["chat-like"].sample(100_000, 1).astype(float)
        self._usual_context = _CHAT_PROMPT + (chat**2).mean() / (2 * chat.mean())

    def __len__(self) -> int:
        """Return the sequences in the engines."""
        return len(self._left)

    def advance(self, seconds: float, limit: int) -> None:
        """Run for some time with `limit` sequences in each engine."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            num_new = self._count_fitting(limit) - len(self._left)
            if num_new > 0:
                new = self._lengths[np.arange(self._next, self._next + num_new) % len(self._lengths)]
                self._next += num_new
                self._left = np.append(self._left, new)
                self._context = np.append(self._context, np.full(num_new, self.workload.prompt_tokens))
            self.now_s += self._compute_step_s(len(self._left), float(self._context.sum()), max(0, num_new))
            self.num_tokens += len(self._left)
            self._left -= 1
            self._context += 1
            goes_on = self._left > 0
            self.num_rows += len(goes_on) - int(goes_on.sum())
            self._left, self._context = self._left[goes_on], self._context[goes_on]

    def compute_steady_rate(self, limit: int) -> float:
        """Return the tokens/s of settled engines: a step with rows of all ages."""
        lengths = self._lengths.astype(float)
        context = self.workload.prompt_tokens + (lengths**2).mean() / (2 * lengths.mean())
        num_seqs = min(limit * self.num_engines, self.model.num_kv_tokens / context)
        return float(num_seqs / self._compute_step_s(num_seqs, num_seqs * context, num_seqs / lengths.mean()))

    def _count_fitting(self, limit: int) -> int:
        mean = self._context.mean() if len(self._context) else self._usual_context
        return int(min(limit * self.num_engines, self.model.num_kv_tokens / mean))

    def _compute_step_s(self, num_seqs: float, num_kv_tokens: float, num_prompts: float) -> float:
        model, each = self.model, num_seqs / self.num_engines
        processor = model.processor[0] + model.processor[1] * each
        kernels = self.num_engines * (model.kernels[0] + model.kernels[1] * each + model.kernels[2] * each**2)
        kernels += model.per_engine * (self.num_engines - 1)
        kernels += model.kv_ns / 1e6 * (num_kv_tokens - num_seqs * self._usual_context)
        kernels += model.prefill_us / 1e3 * num_prompts * (self.workload.prompt_tokens - _CHAT_PROMPT)
        power = model.sharpness
        return float((processor**power + max(kernels, 0.1) ** power) ** (1 / power)) / 1e3


def list_candidates(current: int) -> list[Candidate]:
    """Return other numbers of engines, as `dpgen.tuning.space` lists them."""
    more = fewer = None
    for number in range(SWEEP_ENGINES[-1], current, -1):
        more = Candidate({ENGINES_PER_RANK: number}, 0.05, climbs=True, follows=more)
    for number in range(1, current):
        fewer = Candidate({ENGINES_PER_RANK: number}, 0.03, climbs=True, follows=fewer)
    return [candidate for candidate in (more, fewer) if candidate is not None]


def run_trial(plan: TrialPlan, model: Model, workload: Workload, num_rows: int, random: np.random.Generator) -> Any:
    """Return the result of one trial in virtual time, and the tokens of its finished rows."""
    num_engines = plan.overrides.get(ENGINES_PER_RANK, model.num_engines)
    engines = Engines(model, workload, num_engines, seed=plan.number)
    largest = plan.overrides.get(MAX_NUM_SEQS, DEFAULT_SEQS)
    if ENGINES_PER_RANK not in plan.overrides:  # auto: the first engine is full until the number is decided
        engines.num_engines = 1
        engines.advance(FILL_S, largest)
        engines.num_engines = num_engines
    climb = Climb(plan, largest, num_engines, num_rows, -model.start_s)
    rates: list[float] = []
    while climb.reason is None:
        before = engines.num_tokens, engines.now_s
        engines.advance(SAMPLE_S, climb.limit)
        rates.append((engines.num_tokens - before[0]) / (engines.now_s - before[1]))
        rate = float(np.mean(rates[-2:])) * random.normal(1, NOISE) if len(rates) > 1 else None
        num_running = len(engines)
        climb.update(Sample(engines.now_s, rate, engines.num_rows, engines.num_tokens, 0, num_running, num_running))
    return TrialResult(
        plan.number,
        dict(plan.overrides),
        tuple(climb.stages),
        model.start_s,
        engines.now_s + model.start_s,
        engines.num_rows,
        num_rows,
        largest,
        num_ranks=1,
        num_engines=num_engines,
        tokens_per_row=climb.tokens_per_row,
        num_tokens=engines.num_tokens,
        num_finished=engines.num_rows,
        reason=climb.reason,
    )


def tune(model_name: str, workload_name: str, num_rows: int, seed: int = 0, start_s: float | None = None) -> Any:
    """Return what tuning chose for a pair, against the sweep."""
    model, workload = MODELS[model_name], WORKLOADS[workload_name]
    if start_s is not None:
        model = Model(**{**vars(model), "start_s": start_s})
    random = np.random.default_rng(seed)
    search = Search({}, None, Budget(), lambda result: list_candidates(model.num_engines))
    while (plan := search.propose()) is not None:
        search.record(run_trial(plan, model, workload, num_rows, random))
    assert search.best is not None
    sweep = {
        (engines, seqs): Engines(model, workload, engines).compute_steady_rate(seqs)
        for engines in SWEEP_ENGINES
        for seqs in SWEEP_SEQS
    }
    best = max(sweep, key=sweep.__getitem__)
    engines = search.best.overrides.get(ENGINES_PER_RANK, model.num_engines)
    chosen = Engines(model, workload, engines).compute_steady_rate(search.best.stage.max_num_seqs)
    num_tokens = num_rows * workload.sample(100_000, 2).mean()
    job_s = num_tokens / chosen + model.start_s
    configured = Engines(model, workload, model.num_engines).compute_steady_rate(DEFAULT_SEQS)
    useful_s = sum(result.num_rows for result in search.results) / num_rows * num_tokens / chosen
    return {
        "model": model_name,
        "workload": workload_name,
        "chosen": [engines, search.best.stage.max_num_seqs],
        "best": list(best),
        "chosen_over_best": chosen / sweep[best],
        "chosen_over_configured": chosen / configured,
        "job_s": job_s,
        "wall_fraction": search.spent_s / job_s,
        "added_fraction": (search.spent_s - useful_s) / job_s,
        "num_trials": len(search.results),
        "num_stages": sum(len(result.stages) for result in search.results),
        "reason": search.reason,
    }


def check_fit() -> Iterator[tuple[str, tuple[int, int], int, float]]:
    """Yield each measured point with what the formula says."""
    for name, points in MEASURED.items():
        for (engines, seqs), tokens_per_s in points.items():
            yield name, (engines, seqs), tokens_per_s, _compute_chat_rate(MODELS[name], engines, seqs)


def _compute_chat_rate(model: Model, engines: int, seqs: int) -> float:
    return Engines(model, WORKLOADS["chat-like"], engines).compute_steady_rate(seqs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="of the job (default: %(default)s)")
    parser.add_argument("--start-s", type=float, help="seconds of a trial's start, in place of the models' own")
    parser.add_argument("--seeds", type=int, default=3, help="how often each pair is tuned (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    options = parser.parse_args()
    worst: list[Mapping[str, Any]] = []
    for model in MODELS:
        for workload in WORKLOADS:
            results = [tune(model, workload, options.rows, seed, options.start_s) for seed in range(options.seeds)]
            slowest = {name: max(result[name] for result in results) for name in ("wall_fraction", "added_fraction")}
            worst.append({**min(results, key=lambda result: result["chosen_over_best"]), **slowest})
    if not options.json:
        for name, point, measured, formula in check_fit():
            print(f"{name}, {point[0]} engines of {point[1]}: measured {measured:,}, formula {formula:,.0f} tokens/s")
        head = f"{'model':>10} {'workload':>15} {'chosen':>9} {'over best':>10} {'as configured':>14} {'job':>8} "
        print(head + f"{'trials':>7} {'time':>6} {'added':>6}")
        for row in worst:
            print(
                f"{row['model']:>10} {row['workload']:>15} {row['chosen'][0]}x{row['chosen'][1]:<7} "
                f"{row['chosen_over_best']:>9.3f} {row['chosen_over_configured']:>14.2f} {row['job_s']:>7,.0f}s "
                f"{row['num_trials']:>3}/{row['num_stages']:<3} {100 * row['wall_fraction']:>5.1f}% "
                f"{100 * row['added_fraction']:>5.1f}%  {row['reason']}"
            )
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
