"""argv → config → command → exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from dpgen.config.loader import load_from_args
from dpgen.config.schema import MISSING, Config, legal_keys
from dpgen.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE, ConfigError, DpgenError, PeerFailed
from dpgen.imports import imports_without_gc
from dpgen.lifecycle.parent_death import set_parent_death_signal
from dpgen.lifecycle.shutdown import exit_on_signal
from dpgen.lifecycle.status_file import StatusFile
from dpgen.monitoring.startup import StartupTimer

_USAGE = """\
usage: dpgen run CONFIG.yaml [MORE.yaml ...] [key=value ...]
       dpgen verify RUN_DIR [--json] [--no-input]    checks a run folder, finished or not
       dpgen slurm CONFIG.yaml [key=value ...] ...   prints the sbatch script for a configuration, or submits it
       dpgen simulate [CONFIG.yaml ...] ...          how long a run would take, and on how many ranks

  torchrun --nproc-per-node N -m dpgen run ...    N ranks on this machine
  srun -n N python -m dpgen run ...               ranks from SLURM
  python -m dpgen run ...                         one rank

Generates with an LLM over a whole dataset, data-parallel. YAML files are merged from left to right, then key=value.
Started again with the same command, a run goes on where it stopped.

Exit status: 0 done, 2 wrong usage or configuration, 75 stopped but resumable, 1 anything else.
"""


def main(argv: Sequence[str]) -> int:
    """Runs one command; the exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE + "\n'dpgen run --help' lists every key.")
        return EXIT_OK if argv else EXIT_USAGE
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"dpgen {version('dpgen')}")
        return EXIT_OK
    command, arguments = argv[0], argv[1:]
    if command == "verify":
        from dpgen.commands.verify import main as verify

        return verify(arguments)
    if command == "slurm":
        from dpgen.commands.slurm import main as slurm

        return slurm(arguments)
    if command == "simulate":
        from dpgen.commands.simulate import main as simulate

        return simulate(arguments)
    if command != "run":
        print(f"dpgen: there is no command {command!r}; see dpgen --help", file=sys.stderr)
        return EXIT_USAGE
    if "-h" in arguments or "--help" in arguments:
        print(_USAGE + "\n" + format_config_help())
        return EXIT_OK
    return _run_job(arguments)


def _run_job(arguments: Sequence[str]) -> int:
    """Joins the ranks, then runs; an error on any rank ends all of them, and is said once."""
    from dpgen.distributed.group import PeerLost, SingleRankGroup, StoreLost
    from dpgen.distributed.topology import fill_local_rank, read_topology

    group: Any = SingleRankGroup()
    startup = StartupTimer()
    status_file = StatusFile(os.environ)
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    exit_on_signal(
        lambda: status_file.write_once(group.first_failure_status() or EXIT_RESUMABLE),
        # torchrun says itself that it ends its ranks, and which failure was the first.
        lambda why: None if by_torchrun else print(f"dpgen: stopped: {why}", file=sys.stderr, flush=True),
    )
    if by_torchrun:
        set_parent_death_signal(signal.SIGTERM)  # a killed torchrun leaves no ranks waiting for its store
    try:
        topology = read_topology(os.environ)
        if topology.dp_size > 1:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # lost peers are our news to tell, without frames
            with imports_without_gc():
                from dpgen.distributed.gloo import GlooGroup  # brings torch, which a world of one needs not

            group = GlooGroup(topology)
            topology = fill_local_rank(topology, group.nodes)
            startup.mark("ranks meet")
        group.run_on_all_ranks(lambda: status_file.reset(topology.is_rank_0))
        config: Config = group.run_on_all_ranks(lambda: _load_config(arguments))

        with imports_without_gc():
            from dpgen.run import run

        run(config, topology, group, status_file, startup)
        status_file.write(EXIT_OK)
        return EXIT_OK
    except KeyboardInterrupt:
        return 130
    except (PeerLost, StoreLost) as error:
        status_file.write_once(error.exit_status)  # if it was rank 0 that was lost, nobody else will
        return _report_failure(group, status_file, error)
    except DpgenError as error:
        return _report_failure(group, status_file, error, quiet=type(error) is PeerFailed)
    except Exception as error:  # noqa: BLE001 - the process boundary: a fault of dpgen's, or of a library's
        traceback.print_exc()
        message = f"{type(error).__name__}: {error} (a fault in dpgen or a library; see above)"
        return _report_failure(group, status_file, DpgenError(message))
    finally:
        group.close()


def _load_config(arguments: Sequence[str]) -> Config:
    for each in arguments:
        if each.startswith("-"):
            raise ConfigError(f"unknown option {each}; see dpgen run --help")
    if not arguments:
        raise ConfigError("no configuration; usage: dpgen run CONFIG.yaml [key=value ...]")
    return load_from_args(arguments)


def _report_failure(group: Any, status_file: StatusFile, error: DpgenError, quiet: bool = False) -> int:
    """Tells the other ranks, and the user if none of them has; the exit status."""
    if not quiet and group.announce_failure(str(error), error.exit_status):
        _write_error_report(f"dpgen: {'error' if error.exit_status != 75 else 'stopped'}: {error}")
    # A rank that torchrun stops because of another one's failure ends resumable, which the run is not.
    status_file.write(group.first_failure_status() or error.exit_status)
    return error.exit_status


def _write_error_report(message: str) -> None:
    """Says why the run ended: through torchrun, whose own report is the last thing on the screen, or to stderr.

    torchrun shows a worker's message where it finds one in the file it names (torch.distributed.elastic's error
    file protocol); without it that place says "To enable traceback see ...".
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # torchrun takes the earliest failure for the root cause, in whole seconds; ranks that only follow end
        # within the same one.
        failed_s = int(time.time()) - 1
        info = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(failed_s)}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": info}, file)
    else:
        print(message, file=sys.stderr)


def format_config_help() -> str:
    """Every key with its default and meaning, section by section."""
    lines = []
    section = ""
    for name, default, help in legal_keys():
        head = name.partition(".")[0]
        if head != section:
            lines.append("")
            section = head
        shown = "required" if default == MISSING else json.dumps(default)
        lines += [f"  {name}  ({shown})", *_wrap(help)]
    return "keys, with their defaults:\n" + "\n".join(lines)


def _wrap(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width=100, initial_indent="      ", subsequent_indent="      ")
