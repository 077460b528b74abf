"""Start the process of a rank's first engine before the ranks have joined: it imports vLLM beside the rendezvous.

- Its devices are those that the rank gets if all ranks of its node may run on the same cores, or each on its own, as it
  seems from here: that is not known yet. They cannot be changed later, so the job takes the process only if it would
  start it with the same environment and cores. Otherwise it ends this one, and starts its own.
- The process imports and waits. It has no spec, touches no device, and nobody reads what it prints until it is taken.
  So a job that comes to nothing ends it without a word.

Limits: an engine that several ranks share has the addresses of other ranks in its environment, and starts after the
rendezvous. So does one whose rank does not know its place on its node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence

from dpgen.config.schema import Config
from dpgen.distributed.topology import Topology
from dpgen.engine.starting.cores import count_own_cores
from dpgen.engine.starting.engine_starter import find_placement
from dpgen.engine.starting.server_process import ServerProcess
from dpgen.errors import ConfigError
from dpgen.imports import look_in_import_folders

logger = logging.getLogger(__name__)


class EarlyStart:
    """Hold a process that has been started early, until a job takes it or is over."""

    def __init__(self) -> None:
        self._server: ServerProcess | None = None
        self._surroundings: tuple[Mapping[str, str], Sequence[int] | None] = {}, None

    def begin(self, config: Config, topology: Topology) -> None:
        """Start the process of the first engine if its devices can be told. What is wrong is left to the job to say."""
        if config.parallel.launcher == "external" or topology.launcher == "wrapper":
            return
        own = frozenset(os.sched_getaffinity(0))
        is_bound = count_own_cores(topology.local_size) == len(own)
        given, kind = config.parallel.engines_per_rank, config.run.engine
        if config.program.function is not None:
            look_in_import_folders()  # as the job does: it is part of the environment
        with contextlib.suppress(ConfigError, OSError):
            affinities = [own] * (1 if is_bound else topology.local_size)
            placement = find_placement(config, topology, affinities, None, is_quiet=True)
            self._surroundings = placement.find_surroundings(0, given if isinstance(given, int) else 1)
            self._server = ServerProcess(kind, *self._surroundings)

    def take(self, environment: Mapping[str, str], cores: Sequence[int] | None) -> ServerProcess | None:
        """Return the process, once, if it has this environment and these cores."""
        if self._server is None:
            return None
        if self._surroundings != (environment, cores):
            logger.debug("the engine process that was started early has other devices: starting another")
            self.end()
        server, self._server = self._server, None
        return server

    def end(self) -> None:
        """End the process if no job has taken it."""
        server, self._server = self._server, None
        if server is not None:
            try:
                server.kill()
            except subprocess.TimeoutExpired:
                logger.warning(f"the engine process {server.process.pid}, which no job has taken, can't be ended")
            server.pipe.close()
