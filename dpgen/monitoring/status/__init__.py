"""Tell from any shell how a run is: each rank writes what it does to RUN_DIR/status, and `dpgen status` reads it.

In: phases, totals, engine statistics and results of one rank. Out: rank-N.json (now), rank-N.history.jsonl (over time),
and, from the other side, the status of the whole run. Nothing here waits for a disk in a rank's main thread, and no
failed write ends a run. This is not `dpgen.lifecycle.status_file`, which holds the exit status for a launcher.
"""
