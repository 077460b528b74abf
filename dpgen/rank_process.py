"""Run one rank process: load the configuration, join the ranks, generate, and report an error.

- Each rank loads its configuration before it joins the others, so that its first log line has the format that
  `run.log_format` chooses. An error waits until the group exists.
- An error on any rank ends all ranks. It is reported once, by the first rank to fail.
- Where a configuration can't be loaded, its log format is unknown: the error is text, or JSON if the command line has
  `run.log_format=json`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpgen.config.secrets import redact_text
from dpgen.errors import (
    EXIT_OK,
    EXIT_RESUMABLE,
    DpgenError,
    Interrupted,
    NoRowSucceeded,
    PeerFailed,
)
from dpgen.imports import imports_without_gc
from dpgen.lifecycle.shutdown import exit_on_signal
from dpgen.lifecycle.status_file import StatusFile
from dpgen.log import LogFormat, flush_logging, setup_logging, write_to_stderr
from dpgen.monitoring.startup import StartupTimer

if TYPE_CHECKING:
    from dpgen.config.schema import Config
    from dpgen.distributed.group import RankGroup
    from dpgen.distributed.rendezvous import Departure
    from dpgen.distributed.topology import Topology
    from dpgen.engine.keeping.keeper import EngineKeeper, Keepers
    from dpgen.monitoring.status.reporter import RankReporter
    from dpgen.output.upload.result_upload import ResultUpload
    from dpgen.tuning.probe import TrialProbe

logger = logging.getLogger(__name__)

_STATUS_OF_SIGINT = 128 + 2  # what a shell reports of other programs in this place


@dataclass(frozen=True)
class RankSteps:
    """Hold what a caller does around a run. Each may raise a `DpgenError`.

    Attributes:
        replace_run: is called in place of the run on rank 0, with the number of ranks; None to run.
        on_joined: is called on every rank once the ranks have joined. May be collective.
        prepare: is called on rank 0 before the run.
        publish: is called on rank 0 once the result is written, also if no row of it has succeeded.
        on_complete: is called on every rank after `publish` of a run that has succeeded. May be collective.
        report: takes the error that ended the run, on every rank; None to report it on the terminal, once.
        keepers: have processes between two runs of this process; None to end all with the run.
        trial: measures the engines on some of the rows, and ends the run; None for the whole run.
    """

    replace_run: Callable[[Config, int], None] | None = None
    on_joined: Callable[[RankGroup], None] = lambda _: None
    prepare: Callable[[Config], None] = lambda _: None
    publish: Callable[[Config], None] = lambda _: None
    on_complete: Callable[[RankGroup, Config], None] = lambda _, __: None
    report: Callable[[DpgenError], None] | None = None
    keepers: Keepers | None = None
    trial: TrialProbe | None = None

    @property
    def fatal_signals(self) -> Sequence[int]:
        """Return the signals that end the process before the run, but for Ctrl-C of a caller who needs the process."""
        raises_ctrl_c = self.report is not None or self.replace_run is not None
        return (signal.SIGTERM, signal.SIGUSR1) if raises_ctrl_c else (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


_NO_STEPS = RankSteps()


def run_rank(load_config: Callable[[], Config], arguments: Sequence[str], steps: RankSteps = _NO_STEPS) -> int:
    """Run this process's rank and return its exit status.

    Args:
        load_config: returns the configuration, or raises a `DpgenError`.
        arguments: the command line, which may name the log format.
        steps: what else to do.
    """
    from dpgen.distributed.group import SingleRankGroup
    from dpgen.distributed.rendezvous import Departure
    from dpgen.distributed.topology import read_topology
    from dpgen.monitoring.status.reporter import RankReporter

    group: RankGroup = SingleRankGroup()
    departure, reporter, keepers = Departure(), RankReporter(), _get_keepers(steps)
    loaded: Config | Exception | None = None
    startup, status_file = StartupTimer(), StatusFile(os.environ)
    startup.on_mark = reporter.end_step
    log_format, started_by_torchrun = _find_log_format(None, arguments), "TORCHELASTIC_RUN_ID" in os.environ
    setup_logging(0, log_format)  # until the configuration and the rank are known

    def leave(reason: str) -> None:
        departure.announce(reason)
        status_file.write_once(group.first_failure_status() or EXIT_RESUMABLE)
        reporter.finish(Interrupted(reason))

    # torchrun itself reports that it ends its ranks, and why.
    announce = None if started_by_torchrun else lambda message: _write_error(Interrupted(message), log_format)
    exit_on_signal(leave, announce, steps.fatal_signals)
    if started_by_torchrun and steps.report is None:
        _end_with_torchrun()
    try:
        loaded = _try_load(load_config)
        log_format = _find_log_format(loaded, arguments)
        setup_logging(0, log_format)
        topology = read_topology(os.environ)
        setup_logging(topology.dp_rank, log_format)
        if steps.replace_run is not None:
            return _replace_run(steps.replace_run, loaded, topology)
        _begin(loaded, topology, reporter, keepers.engines)
        if topology.dp_size > 1:
            group, topology = _join_ranks(topology, status_file, departure)
            startup.mark("rendezvous")
        group.run_on_all_ranks(lambda: status_file.reset(topology.dp_rank))
        config = group.run_on_all_ranks(lambda: _get_config(loaded))
        steps.on_joined(group)
        _run(config, topology, group, (status_file, startup, reporter), steps, keepers)
        status_file.write(EXIT_OK)
        return EXIT_OK
    except KeyboardInterrupt as error:
        return _report_ctrl_c(error, reporter, steps.report)
    except DpgenError as error:
        return _report_failure(group, (status_file, reporter), error, log_format, steps.report)
    except Exception as error:  # noqa: BLE001 - the process boundary: a fault of dpgen's, or of a library's
        return _report_failure(group, (status_file, reporter), _log_unexpected(error), log_format, steps.report)
    finally:
        _close(keepers.engines, group)
        _write_report(group, reporter, loaded)


def _log_unexpected(error: Exception) -> DpgenError:
    """Log an error with its traceback, and return what is reported in its place."""
    logger.error("unexpected error", exc_info=error)
    return DpgenError(f"{type(error).__name__}: {error} (a fault in dpgen or a library; see above)")


def _end_with_torchrun() -> None:
    """Let the kernel end this rank with its torchrun: a killed one leaves no ranks waiting for its store."""
    from dpgen.lifecycle.parent_death import set_parent_death_signal

    set_parent_death_signal(signal.SIGTERM)


def _run(
    config: Config,
    topology: Topology,
    group: RankGroup,
    reports: tuple[StatusFile, StartupTimer, RankReporter],
    steps: RankSteps,
    keepers: Keepers,
) -> None:
    """Run the job, with the command's own steps around it, and report the end."""
    with imports_without_gc():
        from dpgen.data.openai_batch.recognition import resolve_format
        from dpgen.distributed.agreement import fetch_agreed_input
        from dpgen.run import Reports, run

    fetched = fetch_agreed_input(config.data, group)
    resolved = group.run_on_all_ranks(lambda: resolve_format(config, fetched))
    group.run_on_all_ranks(lambda: _prepare(steps, resolved, group) if group.rank == 0 else None)
    try:
        run(resolved, topology, group, Reports(*reports), keepers, steps.trial)
    except NoRowSucceeded:
        _publish(steps, resolved, group, reports[-1])
        raise
    _publish(steps, resolved, group, reports[-1])
    steps.on_complete(group, resolved)
    reports[-1].finish()


def _close(keeper: EngineKeeper, group: RankGroup) -> None:
    """End the engine that no job has taken, and leave the group."""
    keeper.early.end()
    group.close()


def _write_report(group: RankGroup, reporter: RankReporter, loaded: Config | Exception | None) -> None:
    """Write the report on the attempt that has ended, if one had begun; only rank 0 does, and no other rank waits."""
    ending = reporter.ending
    if group.rank != 0 or ending is None or loaded is None or isinstance(loaded, Exception) or not loaded.run.report:
        return
    from dpgen.report.facts import RunEnding
    from dpgen.report.writing import write_final_report

    write_final_report(loaded.run.dir, RunEnding(*ending))
    flush_logging()


def _prepare(steps: RankSteps, config: Config, group: RankGroup) -> None:
    steps.prepare(config)
    if config.output.to is not None:
        _make_upload(config, group).check()


def _publish(steps: RankSteps, config: Config, group: RankGroup, reporter: RankReporter) -> None:
    if group.rank > 0:  # these ranks may have ended: their part is done
        return
    if config.output.to is not None:
        reporter.enter_phase("uploading the result")
        _make_upload(config, group).upload()
    steps.publish(config)


def _make_upload(config: Config, group: RankGroup) -> ResultUpload:
    from dpgen.journal.run_dir import RunDir
    from dpgen.output.upload.result_upload import ResultUpload

    assert config.output.to is not None
    return ResultUpload(RunDir(config.run.dir), config.output.to, config.output.storage_options, group.heartbeat)


def _try_load(load_config: Callable[[], Config]) -> Config | Exception:
    try:
        return load_config()
    except Exception as error:  # noqa: BLE001 - raised again by `_get_config`, once the group exists
        return error


def _get_config(loaded: Config | Exception) -> Config:
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


def _replace_run(replace_run: Callable[[Config, int], None], loaded: Config | Exception, topology: Topology) -> int:
    """Do something else than the run on rank 0, and return the exit status. The ranks do not join."""
    if topology.is_rank_0:
        replace_run(_get_config(loaded), topology.dp_size)
    return EXIT_OK


def _get_keepers(steps: RankSteps) -> Keepers:
    from dpgen.engine.keeping.keeper import Keepers

    return steps.keepers or Keepers()


def _begin(loaded: Config | Exception, topology: Topology, reporter: RankReporter, keeper: EngineKeeper) -> None:
    """Begin what needs this rank alone, if its configuration is good: its status, and the import of its engine."""
    if topology.dp_size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # dpgen reports lost peers itself, without C++ frames
    if isinstance(loaded, Exception):
        return
    keeper.begin_early(loaded, topology)
    reporter.start(Path(loaded.run.dir).expanduser(), topology.dp_rank, topology.dp_size)
    if topology.dp_size > 1:
        reporter.enter_phase("joining the other ranks")


def _find_log_format(loaded: Config | Exception | None, arguments: Sequence[str]) -> LogFormat:
    if loaded is None or isinstance(loaded, Exception):
        return "json" if "run.log_format=json" in arguments else "text"
    return loaded.run.log_format


def _join_ranks(topology: Topology, status_file: StatusFile, departure: Departure) -> tuple[RankGroup, Topology]:
    """Return the group of all ranks, and the topology with this rank's place on its node. Collective."""
    from dpgen.distributed.network import wait_until_resolved
    from dpgen.distributed.topology import fill_local_rank

    wait_until_resolved(topology.master_addr, topology.source)  # before torch is imported: a wrong name is told at once
    with imports_without_gc():
        from dpgen.distributed.gloo.rank_group import GlooGroup  # imports torch, which a world of one does not need

    group = GlooGroup(topology, lambda: status_file.write_once(EXIT_RESUMABLE), departure)
    given = group.all_gather_object((topology.local_rank, os.environ.get("CUDA_VISIBLE_DEVICES", "")))
    return group, fill_local_rank(topology, group.nodes, given)


def _report_ctrl_c(
    error: KeyboardInterrupt, reporter: RankReporter, report: Callable[[DpgenError], None] | None
) -> int:
    """Report a Ctrl-C that came before the run, which handles it, and return the exit status."""
    reporter.finish(error)
    if report is not None:
        report(Interrupted("interrupted by SIGINT before the run started"))
    return _STATUS_OF_SIGINT


def _report_failure(
    group: RankGroup,
    status: tuple[StatusFile, RankReporter],
    error: DpgenError,
    log_format: LogFormat,
    report: Callable[[DpgenError], None] | None,
) -> int:
    """Announce the error to the other ranks, report it if no other rank has, and return the exit status."""
    from dpgen.distributed.group import PeerLost, StoreLost

    status_file, reporter = status
    reporter.finish(error)
    if isinstance(error, (PeerLost, StoreLost)):
        status_file.write_once(error.exit_status)  # if rank 0 is the one that was lost, it writes no status
    is_reported_by_peer = type(error) is PeerFailed
    is_first = not is_reported_by_peer and group.announce_failure(str(error), error.exit_status)
    if report is not None:
        report(error)
    elif is_first:
        _write_error(error, log_format)
    # A rank that torchrun stops because another one failed exits as resumable, which the run is not.
    status_file.write(group.first_failure_status() or error.exit_status)
    return error.exit_status


def _write_error(error: DpgenError, log_format: LogFormat) -> None:
    """Report why the run ended: as a JSON record, else in torchrun's report, else on stderr, after all log lines.

    torchrun's report is the last thing on the screen. It shows a worker's message if the file that torchrun names holds
    one (torch.distributed.elastic's error file protocol); without a message it prints "To enable traceback see ...".
    It reports no attempt that it restarts, and no file that can't be written.
    """
    is_resumable = error.exit_status == EXIT_RESUMABLE
    reason = redact_text(str(error))
    message = f"dpgen: {'stopped' if is_resumable else 'error'}: {reason}"
    path, is_text = os.environ.get("TORCHELASTIC_ERROR_FILE", ""), log_format == "text"
    if not is_text:
        logger.log(logging.WARNING if is_resumable else logging.ERROR, reason)
    flush_logging()
    is_written = bool(path) and _write_error_file(Path(path), message)
    if is_text and (not is_written or _is_restarted_by_torchrun(os.environ)):
        write_to_stderr(message)


def _write_error_file(path: Path, message: str) -> bool:
    """Write torchrun's error file, and return False if it can't be written: torchrun fails on one that is cut short."""
    from dpgen.journal.files import atomic_write_text

    # torchrun takes the earliest failure for the root cause, in whole seconds. Ranks that only follow end within the
    # same second, so this one is dated a second back.
    info = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()) - 1)}}
    try:
        atomic_write_text(path, json.dumps({"message": info}))
    except DpgenError:
        return False
    return True


def _is_restarted_by_torchrun(environ: Mapping[str, str]) -> bool:
    """Return True if torchrun starts the ranks again once one has failed."""
    try:
        return int(environ["TORCHELASTIC_RESTART_COUNT"]) < int(environ["TORCHELASTIC_MAX_RESTARTS"])
    except (KeyError, ValueError):
        return False
