"""Run jobs from a Python program: `generate`, `stream` and `Session`, which `dpgen` itself exports.

- In: rows that a program holds, and settings as keywords. Out: a Dataset, or its rows as they are finished.
- The program's own process runs no rank: ranks are child processes (`processes`, `worker`). So its signal handlers,
  environment, logging and torch.distributed groups stay as they are, and any thread may call.
- A call is the same job as `dpgen run`, with the same configuration, run directory and guarantees.
- Never imports the command line.
"""
