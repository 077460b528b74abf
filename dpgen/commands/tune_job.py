"""Run the trials of `dpgen tune`: each is a start of the job's ranks, which ends once its engines are measured.

- This process starts the ranks, as a Python program does (`dpgen.api.processes`), and loads neither torch nor a model.
- A trial that fails is a line of the table. If the job can't run as it is configured, that is the error of the command.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpgen.api.jobs import Outcome, RankJob
from dpgen.api.processes import RankProcesses
from dpgen.config.loader import load_from_args
from dpgen.config.schema import Config
from dpgen.engine.pool.device_monitor import DeviceMonitor
from dpgen.engine.starting.visible_gpus import list_visible_gpus
from dpgen.errors import EXIT_RESUMABLE, ConfigError, DpgenError, Interrupted, RanksLost
from dpgen.formatting import format_count, format_duration
from dpgen.journal.run_dir import RunDir
from dpgen.lifecycle.shutdown import parse_time_limit
from dpgen.simulation.hardware import find_batched_tokens, read_gpu_name
from dpgen.tuning.search import Search
from dpgen.tuning.space import (
    Facts,
    check_tunable,
    choose_first_overrides,
    find_base_limit,
    find_changes,
    list_candidates,
    list_engine_options,
)
from dpgen.tuning.store import compute_base, describe_machine, read_results, write_results
from dpgen.tuning.table import format_settings
from dpgen.tuning.trial import Budget, TrialPlan, TrialResult, get_trial_path, read_trial

logger = logging.getLogger(__name__)

# A trial leaves the rest of the run alone: no page, no upload, no rows on the screen.
_TRIAL_ARGUMENTS = (
    "run.report=false",
    "run.show_rows=0",
    "run.progress_interval_s=3600",
    "run.log_format=text",
    "output.to=null",
)
_WARNING = re.compile(r"\S+ \S+ (?:WARNING|ERROR) \[rank \d+\] (.+)")
_MAX_REASON_CHARS = 160


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """Hold what the command line asks for.

    Attributes:
        arguments: YAML files and key=value of the job.
        num_ranks: of the job.
        is_launched: torchrun has started this process, and the ranks of a trial are started apart from it.
        speculative: methods of speculative decoding to try.
    """

    arguments: Sequence[str]
    num_ranks: int = 1
    is_launched: bool = False
    budget: Budget = dataclasses.field(default_factory=Budget)
    speculative: Sequence[str] = ()


class TuneJob:
    """Try settings until the search ends.

    Attributes:
        config: of the job.
        search: has the results.
        is_complete: the last row was finished by a trial, so that the job is done.

    Raises:
        ConfigError: trials can't be made of this job.
    """

    def __init__(self, options: TuneOptions) -> None:
        self._options, self._began_s = options, time.monotonic()
        self.config = load_from_args(options.arguments)
        check_tunable(self.config)
        self.base_limit = find_base_limit(self.config)
        self.num_gpus = _count_gpus(self.config, options.num_ranks)
        self.search = Search(
            choose_first_overrides(self.config), self.base_limit, options.budget, self._find_candidates
        )
        self.is_complete = False
        self._run_dir = RunDir(self.config.run.dir)
        self._base = compute_base(self.config, options.num_ranks)
        self._machine = describe_machine()
        self._stored = read_results(self._run_dir.tuning, self._base, self._machine)
        self._ranks: RankProcesses | None = None
        self._interruption: Interrupted | None = None
        self._warnings = set[str]()
        self._is_resumable = False  # a trial that measured nothing was ended by something that may pass
        self._num_started = 0  # rank processes of `_ranks`

    @property
    def num_gpus_or_ranks(self) -> int:
        """Return what a run occupies: its GPUs, or its ranks where it uses none."""
        return self._options.num_ranks * self.config.gpus_per_rank

    def run(self) -> None:
        """Make trials until the search ends.

        Raises:
            ConfigError: the job can't run as it is configured, or has no rows left.
            Interrupted: by Ctrl-C, a signal or a time limit. The same command continues.
            DpgenError: the job's own settings could not be measured, or ranks were lost.
        """
        if self._run_dir.is_finished and not self._stored:
            raise ConfigError(f"run.dir={self._run_dir.path} holds a complete result: no row is left to measure with")
        if self._stored:
            logger.info(f"continuing after {format_count(len(self._stored), 'trial')} of an earlier start")
        try:
            while not self.is_complete and (plan := self.search.propose()) is not None:
                number = len(self.search.results)
                if number < len(self._stored) and dict(self._stored[number].overrides) == dict(plan.overrides):
                    self.search.record(self._stored[number])
                    continue
                if self._run_dir.is_finished:
                    self.is_complete = True
                    break
                self._stored = self._stored[:number]
                self.search.record(self._run_trial(plan))
                if self.search.best is not None or self.is_complete:  # else the same trials are made again
                    write_results(self._run_dir.tuning, self._base, self._machine, self.search.results)
                if self._interruption is not None and not self.is_complete:
                    raise self._interruption
        finally:
            if self._ranks is not None:
                self._ranks.close()
        self.is_complete |= self.search.best is None and self._run_dir.is_finished
        if self.is_complete:
            self.search.reason = "the job's last row was finished meanwhile"
        if self.search.best is None and not self.is_complete:
            reasons = "; ".join(filter(None, (result.error for result in self.search.results)))
            error = DpgenError(f"the job's own settings could not be measured: {reasons or 'too few rows are left'}")
            error.exit_status = EXIT_RESUMABLE if self._is_resumable else error.exit_status
            raise error

    def count_ranks_of(self, overrides: Mapping[str, Any]) -> int:
        """Return how many ranks the job has with some settings."""
        return self.count_ranks(self.make_config(TrialPlan(1, overrides)))

    def count_ranks(self, config: Config) -> int:
        """Return how many ranks a configuration's job has on the same GPUs."""
        return max(1, self.num_gpus_or_ranks // config.gpus_per_rank)

    # ---- one trial

    def _run_trial(self, plan: TrialPlan) -> TrialResult:
        logger.info(f"trial {plan.number}: {format_settings(plan.overrides)}")
        folder, started_s = self._run_dir.tuning, time.time()
        get_trial_path(folder, plan.number).unlink(missing_ok=True)
        failed = TrialResult(plan.number, dict(plan.overrides))
        try:
            config = self.make_config(plan)
        except ConfigError as error:
            return dataclasses.replace(failed, error=_shorten(str(error)))
        config = self._limit_time(config)
        plan = dataclasses.replace(plan, folder=os.path.abspath(folder), started_s=started_s)
        shutil.rmtree(self._scratch_dir, ignore_errors=True)  # an interrupted start may have left it
        ranks = self._get_ranks(self.count_ranks(config))
        ranks.submit(RankJob(config, "", "rank0", trial=plan))
        report = _StageReport(folder, plan.number)
        outcome = ranks.wait(report.show)
        report.show(is_last=True)
        result = read_trial(folder, plan.number)
        self.is_complete = outcome.error_type is None
        is_measured = result is not None and (bool(result.reason) or self.is_complete)
        self._interruption = self._find_interruption(plan, outcome, ranks)
        if result is None or not is_measured:
            self._raise_if_over(plan, outcome)
            result = dataclasses.replace(failed, error=_shorten("; ".join(outcome.messages) or "nothing was measured"))
            if self.is_complete:
                result = dataclasses.replace(failed, reason="the rows ran out")
            logger.info(f"trial {plan.number} found nothing: {result.error or result.reason}")
        if config.run.dir == str(self._scratch_dir):
            self.is_complete = False
            shutil.rmtree(self._scratch_dir, ignore_errors=True)
            result = dataclasses.replace(result, num_rows=0)
        return dataclasses.replace(result, wall_s=round(time.time() - started_s, 2))

    @property
    def _scratch_dir(self) -> Path:
        """Return the run directory of trials whose rows do not count; it is removed after each."""
        return self._run_dir.tuning.absolute() / "other-draws"

    def _find_interruption(self, plan: TrialPlan, outcome: Outcome, ranks: RankProcesses) -> Interrupted | None:
        """Return what ends the whole search; None if the trial has ended by itself."""
        error = None if outcome.error_type is None else outcome.to_error()
        if isinstance(error, Interrupted) and plan.end not in str(error):  # its limit is what is left of the search's
            return Interrupted(re.sub(r"(?<=run\.time_limit=)\S+", str(self.config.run.time_limit), str(error)))
        if ranks.was_interrupted:
            return Interrupted("interrupted. Rerun the same command to resume")
        return None

    def _raise_if_over(self, plan: TrialPlan, outcome: Outcome) -> None:
        """Raise what ends the command and is no trial's result: it says nothing about the settings that were tried."""
        if self._interruption is not None:
            raise self._interruption
        if outcome.error_type is None:
            return
        error = outcome.to_error()
        if isinstance(error, RanksLost):
            raise error
        is_own = not plan.overrides  # the first trial may have more sequences than the engine takes
        if isinstance(error, ConfigError) and (is_own or str(error).startswith(("run.", "data."))):
            raise error
        self._is_resumable |= error.is_resumable

    def _limit_time(self, config: Config) -> Config:
        """Return a trial's configuration with what is left of `run.time_limit`, which is of the whole search."""
        if (limit := config.run.time_limit) is None:
            return config
        left_s = math.ceil(parse_time_limit(limit) - (time.monotonic() - self._began_s))
        if left_s <= 0:
            raise Interrupted(f"run.time_limit={limit} is near. Rerun the same command to resume")
        return dataclasses.replace(config, run=dataclasses.replace(config.run, time_limit=str(left_s)))

    def make_config(self, plan: TrialPlan) -> Config:
        """Return the configuration of a trial.

        Raises:
            ConfigError: its settings do not fit the job.
        """
        own = [*_TRIAL_ARGUMENTS]
        if plan.number > 1:
            own.append("run.max_engine_deaths=1")
        if find_changes(plan.overrides) == "draws":  # another run, whose rows are not this one's
            own.append(f"run.dir={self._scratch_dir}")
        values = [f"{key}={json.dumps(value)}" for key, value in plan.overrides.items()]
        keys = [argument.partition("=")[0] for argument in (*own, *values)]
        given = [argument for argument in self._options.arguments if argument.partition("=")[0] not in keys]
        return load_from_args([*given, *own, *values])

    def _get_ranks(self, number: int) -> RankProcesses:
        """Return the rank processes, started again where there must be another number of them."""
        if self._ranks is not None and (number != self._num_started or not self._ranks.is_alive):
            self._ranks.close()
            self._ranks = None
        if self._ranks is None:
            is_alone = number == 1 and not self._options.is_launched
            self._ranks = RankProcesses(None if is_alone else number, is_quiet=True, is_shown=self._is_new_warning)
            self._num_started = number
        return self._ranks

    def _is_new_warning(self, line: str) -> bool:
        """Return True for a line of the ranks' log that is a warning, the first time: most trials repeat it."""
        match = _WARNING.match(line)
        if match is None or match[1] in self._warnings:
            return False
        self._warnings.add(match[1])
        return True

    # ---- what to try

    def _find_candidates(self, first: TrialResult) -> list[Any]:
        stage = first.best_stage
        assert stage is not None
        num_prompt_tokens = first.num_prompt_tokens
        num_tokens = num_prompt_tokens + first.num_rows * self.search.tokens_per_row
        facts = Facts(
            num_gpus=self.num_gpus,
            has_gpus=self.num_gpus > 0,
            max_num_seqs=stage.max_num_seqs,
            is_largest=stage.max_num_seqs == max(other.max_num_seqs for other in first.stages),
            prompt_fraction=num_prompt_tokens / num_tokens if num_tokens else None,
            cached_fraction=first.num_cached_tokens / num_prompt_tokens if num_prompt_tokens else None,
            num_engines_per_rank=first.num_engines // max(1, first.num_ranks),
            engine_options=list_engine_options(self.config.run.engine),
            batched_tokens=find_batched_tokens(read_gpu_name(), DeviceMonitor(os.environ).memory_bytes),
        )
        return list_candidates(self.config, facts, self._options.speculative)


class _StageReport:
    """Log what a trial has measured, as soon as it has."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number, self._num_shown, self._next_s = folder, number, 0, 0.0

    def show(self, *, is_last: bool = False) -> None:
        """Look for something new, now and then."""
        if time.monotonic() < self._next_s and not is_last:
            return
        self._next_s = time.monotonic() + 0.5
        result = read_trial(self._folder, self._number)
        for stage in result.stages[self._num_shown :] if result else ():
            logger.info(
                f"trial {self._number}: {format_count(stage.max_num_seqs, 'sequence')} at a time: "
                f"{stage.tokens_per_s:,.0f} ± {stage.half_width:,.0f} tokens/s, "
                f"measured in {format_duration(stage.seconds)}"
            )
        self._num_shown = len(result.stages) if result else 0


def _count_gpus(config: Config, num_ranks: int) -> int:
    """Return the GPUs of this machine that the job's engines run on; 0 where they use none."""
    if config.run.engine != "vllm" or read_gpu_name() is None:
        return 0
    num_gpus = num_ranks * config.gpus_per_rank
    if config.parallel.share_devices:
        num_gpus = min(num_gpus, len(list_visible_gpus(os.environ, os.listdir("/dev"), is_quiet=True)) or num_gpus)
    return num_gpus


def _shorten(reason: str) -> str:
    first = reason.strip().partition("\n")[0]
    return first if len(first) <= _MAX_REASON_CHARS else f"{first[: _MAX_REASON_CHARS - 3]}..."
