"""Programs that make many calls of the model for each row: the handle they get, and some that are ready to use.

In: a row, and `handle.Llm`. Out: a dict of columns. `program.function=dpgen.programs.critique:revise` runs one.
Never imports what runs programs: it implements `handle.Port`. Knows neither journals nor engines.
"""
