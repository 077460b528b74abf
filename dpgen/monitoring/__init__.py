"""Show a run to its user: a preview, progress, status files, trackers, start-up times, and the report at the end.

In: totals over all ranks once a second (`dpgen.scheduling`), each rank's phases and results, and the ranks' manifests
(`dpgen.records`); for a preview the configuration alone. Out: a bar on rank 0's terminal, or log lines; RUN_DIR/status;
what `output.track` names; a `Preview` and its lines. Only `progress_bar`, `preview_text` and `status/live_page` import
rich, and only where there is a terminal.
Never imports torch or vLLM. Only `preview` and its parts import `engine`, `output` or `distributed`.
"""
