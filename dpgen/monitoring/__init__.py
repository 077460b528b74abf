"""Show a run to its user: live progress, start-up times, and the report at the end.

In: totals over all ranks once a second (`dpgen.scheduling`) and the ranks' manifests (`dpgen.records`). Out: a bar
on rank 0's terminal, or log lines. Only `progress_bar` imports rich, and only where there is a terminal.
Never imports torch, vLLM, `engine`, `output` or `distributed`.
"""
