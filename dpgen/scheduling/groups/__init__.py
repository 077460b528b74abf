"""Group rows that belong together: rows with a common prefix, and rows with the same prompt.

In: hashes of prompts, row indices, and counts of finished rows.
Out: numpy arrays of row indices, and where groups begin in them. Pure logic: no process, store or clock.
Never imports the order, plans or claims.
"""
