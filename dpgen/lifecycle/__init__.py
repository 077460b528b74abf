"""Start and end processes well: signals, time limits, the exit status of the run, and SLURM's requeueing.

In: signals, deadlines, and the environment of the launcher. Out: the reason to stop (`ShutdownMonitor`), the status
file for the process that started the run (`StatusFile`), and the decision to requeue a SLURM job.
Imports only the top-level modules: never torch, vLLM, `config` or any other wing.
"""
