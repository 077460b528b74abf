"""Engines: one child process per rank that generates text with vLLM, and a supervisor that restarts it.

In: an `EngineSpec` and lists of `Request`, from the rank process.
Out: `RowsFinished` and `EngineStats`; the output of each engine goes to RUN_DIR/logs/rank-N.engine.log.
The rank process never imports vLLM or CUDA: only `server` and the modules that it loads do.
Never imports scheduling, monitoring, simulation or commands.
"""
