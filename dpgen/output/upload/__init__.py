"""Bring a run's result to `output.to`: every file, then `_SUCCESS`. It is complete in the run directory before.

Only rank 0 calls this. An upload that broke off is continued by the same command, without generating anything.
"""
