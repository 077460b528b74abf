"""Export a run's rows to other files and to the Hub: `source` → `selection` → `formats` → `target` or `hub`.

In: a run directory, finished or not. Out: files that other programs read, published whole or not at all.
Memory stays flat: rows are streamed, a batch of them at a time. Nothing in the run directory is changed.
"""
