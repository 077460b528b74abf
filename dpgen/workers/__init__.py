"""Run work on rows in worker processes of the rank: what may be slow, crash, hang or need heavy imports.

In: tasks, and the name of the function that handles them. Out: each task's answer, or why there is none.
A crash or a hang costs one task. The rank never waits: it submits, and asks later.
Never imports what the workers do: they import it themselves, by name. Knows neither rows nor engines.
"""
