"""Show a run to its user: live progress, status files, trackers, start-up times, and the report at the end.

In: totals over all ranks once a second (`dpgen.scheduling`), each rank's phases and results, and the ranks' manifests
(`dpgen.records`). Out: a bar on rank 0's terminal, or log lines; RUN_DIR/status; what `output.track` names. Only
`progress_bar` and `status/live_page` import rich, and only where there is a terminal.
Never imports torch, vLLM, `engine`, `output` or `distributed`.
"""
