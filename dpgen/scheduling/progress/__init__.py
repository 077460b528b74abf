"""Count what a rank has done: totals over all ranks, rates and latencies, and rows that only fail or take too long.

In: finished rows and the engine's statistics.
Out: totals for the all-reduce, rates, and the decision to stop early.
"""
