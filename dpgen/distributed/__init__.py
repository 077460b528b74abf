"""Place this process among the ranks of the job, and connect the ranks.

In: the launcher's environment and the ranks' small messages. Out: a `Topology`, the `Layout` of engines, and a
`RankGroup` with collectives, counters, heartbeats and failure reports; the agreements with which a job starts.
Home of `torch.distributed`, imported for two or more ranks only.
Never imports vLLM, `output`, `engine`, `scheduling` or `run`.
"""
