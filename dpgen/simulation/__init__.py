"""Simulate runs in virtual time with the real scheduling code and modelled engines.

In: an `EngineCostModel` (given, or measured by `calibration`), a `Workload` (lengths may come from `lengths`), a number
of ranks and the `work` section. Out: a `SimulationResult` with times, claims and preemptions.
`estimate` makes both from a preview of a run (`dpgen.monitoring.preview`).
Never imports torch or vLLM; only `dpgen.commands` imports this wing.
"""
