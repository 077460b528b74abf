"""Run the jobs of a Python program as one rank: `python -m dpgen.api.worker FOLDER`, see `dpgen.api.jobs`.

- The ranks join for each job anew. Between jobs they are not connected; only the engine is kept.
- This process ends when the program closes it, or ends itself: then its job is interrupted, resumable. A program that
  was killed leaves its folder to the ranks, which remove it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from dpgen.api.jobs import Outcome, RankJob, read_job, write_outcome
from dpgen.config.schema import Config
from dpgen.config.secrets import redact_text
from dpgen.distributed.attempt import shares_run_dir
from dpgen.distributed.group import RankGroup
from dpgen.distributed.topology import read_topology
from dpgen.engine.keeping.keeper import EngineKeeper, Keepers
from dpgen.errors import ConfigError, DpgenError
from dpgen.journal.run_dir import RunDir
from dpgen.lifecycle.standard_streams import fill_closed_streams
from dpgen.log import flush_logging, write_to_stderr
from dpgen.rank_process import RankSteps, run_rank
from dpgen.tuning.probe import TrialProbe
from dpgen.workers.keeper import WorkerKeeper

_POLL_S = 0.02
_GRACE_S = 60.0  # how long a job may take to stop once the program has ended
_SENT_BYTES = 64 << 20  # of the result in one round, over all ranks


def main() -> None:
    """Serve the program whose folder the command line names, until it closes this rank."""
    fill_closed_streams()
    folder, keeper, number = Path(sys.argv[1]), EngineKeeper(), 0
    workers, has_program_ended = WorkerKeeper(), threading.Event()
    try:
        rank = read_topology(os.environ).dp_rank
    except DpgenError:
        rank = 0  # which the first job reports
    with contextlib.suppress(FileNotFoundError):  # another rank has removed the folder: the program has ended
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
    threading.Thread(target=_end_with_program, args=(folder, has_program_ended), name="program", daemon=True).start()
    while (job := _wait_for_job(folder, number, has_program_ended)) is not None:
        engines = keeper if job.trial is None else EngineKeeper(has_one_job=True)
        _run_job(folder, number, rank, job, Keepers(engines, workers))
        number += 1
    keeper.close()
    workers.close()
    flush_logging()
    os._exit(0)  # as `dpgen.__main__` does


def _wait_for_job(folder: Path, number: int, has_program_ended: threading.Event) -> RankJob | None:
    while not has_program_ended.is_set():
        if (job := read_job(folder, number)) is not None:
            return job
        if not folder.is_dir() or (folder / "close").exists():
            return None
        time.sleep(_POLL_S)
    return None


def _run_job(folder: Path, number: int, rank: int, job: RankJob, keepers: Keepers) -> None:
    outcomes: list[Outcome] = []

    def report(error: DpgenError) -> None:
        outcomes.append(Outcome.of_error(rank, error))

    def load() -> Config:
        if (folder / f"interrupt-{number}").exists():  # it came before this job was read
            raise KeyboardInterrupt
        try:
            os.chdir(job.directory)
        except OSError as error:
            raise ConfigError(f"the working directory {job.directory} can't be used: {error.strerror}") from None
        return _get_config(job)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the first job
    steps = RankSteps(
        on_joined=lambda group: _check_same_dataset(group, job.digest),
        on_complete=lambda group, config: _share_result(group, config) if job.result_on == "all" else None,
        report=report,
        keepers=keepers,
        trial=None if job.trial is None else TrialProbe(job.trial, rank, max_tokens=_find_max_tokens(job.config)),
    )
    status = run_rank(load, (), steps)
    _restore_signals()
    if status and not outcomes:
        report(DpgenError(f"the rank ended with status {status}"))
    flush_logging()
    outcome = outcomes[0] if outcomes else Outcome(rank)
    try:
        write_outcome(folder, number, outcome)
    except FileNotFoundError:
        return  # the program has ended, and its folder is gone
    except OSError as error:  # the disk is full: the program shows the last lines of ranks that end
        write_to_stderr(redact_text("\n".join(outcome.messages)))
        write_to_stderr(f"rank {rank} can't report this in {folder}: {error.strerror}")
        os._exit(1)


def _find_max_tokens(config: Config | DpgenError) -> float:
    """Return the most tokens of every sequence; 0 where rows have limits of their own, or several calls."""
    if isinstance(config, DpgenError) or config.program.function is not None:
        return 0.0
    is_own = "max_tokens" in config.sampling_columns or config.prompt.request_column is not None
    limit = None if is_own else config.sampling.get("max_tokens")
    return float(limit) if isinstance(limit, int) else 0.0


def _get_config(job: RankJob) -> Config:
    if isinstance(job.config, DpgenError):
        raise job.config
    return job.config


def _restore_signals() -> None:
    """Let signals end this process while it has no job."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    if (descriptor := signal.set_wakeup_fd(-1)) != -1:
        os.close(descriptor)  # ends the thread that reads it


def _end_with_program(folder: Path, has_ended: threading.Event) -> None:
    """End this process once the program that holds the other end of stdin has ended; it takes no further job."""
    while os.read(0, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    has_ended.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


def _check_same_dataset(group: RankGroup, digest: str) -> None:
    """Check that all ranks were called with the same rows. Collective."""
    digests = group.all_gather_object(digest)

    def check() -> None:
        if different := [rank for rank, other in enumerate(digests) if other != digests[0]]:
            raise ConfigError(
                f"the ranks were called with different datasets: that of rank {different[0]} is not that of rank 0. "
                "Make it the same way on every rank; dpgen divides the rows itself"
            )

    group.run_on_all_ranks(check)


def _share_result(group: RankGroup, config: Config) -> None:
    """Copy rank 0's RUN_DIR/dataset to each rank that does not see it. Collective."""
    run_dir = RunDir(config.run.dir)
    needs_copy = not shares_run_dir(group, run_dir.path)
    if not any(group.all_gather_object(needs_copy)):
        return
    files = sorted(path for path in run_dir.dataset.iterdir() if path.is_file()) if group.rank == 0 else []
    names: list[str] = group.all_gather_object([path.name for path in files])[0]
    if needs_copy:
        run_dir.dataset.mkdir(parents=True, exist_ok=True)
        for path in run_dir.dataset.iterdir():  # of an earlier result
            if path.is_file() and path.name not in names:
                path.unlink(missing_ok=True)
    for place, name in enumerate(names):
        source = files[place].open("rb") if group.rank == 0 else None
        target = (run_dir.dataset / name).open("wb") if needs_copy else None
        while True:
            chunk = source.read(_SENT_BYTES // group.size) if source is not None else None
            sent: bytes = group.all_gather_object(chunk)[0]
            if not sent:
                break
            if target is not None:
                target.write(sent)
        for file in (source, target):
            if file is not None:
                file.close()


if __name__ == "__main__":
    main()
