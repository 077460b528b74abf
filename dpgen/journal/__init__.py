"""Store every finished row on disk within a second, and read the rows back after any crash.

In: results (`dpgen.records`) that one rank's loop appends. Out: segment files in `RUN_DIR/journal`, an index over
their rows, and single results. `run_dir` holds the paths of a run and decides whether a run may resume in them.
Never imports torch, vLLM, `distributed`, `engine` or `output`.
"""
