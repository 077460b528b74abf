"""Random faults in whole runs: `plan` says what goes wrong in one attempt, `faults` makes it, `series` repeats it."""
