"""Decide which rank generates which row, and when: order, shards, claims, admission and the generation loop.

In: the input's rows, the rows in journals, finished rows and statistics from the engine.
Out: requests to the engine, results to the journal, and totals over all ranks.
Claims, admission, order and resharding are pure logic over a `CounterStore`; the simulator runs the same code.
Never imports vLLM, torch, the result's writer, monitoring, simulation or commands.
"""
