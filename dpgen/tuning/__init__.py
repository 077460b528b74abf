"""Find the settings with which a job runs fastest, by trying them on the job's own rows.

In: a configuration, and what each trial has measured. Out: the next trial, a table, and the best settings as YAML.
Search, climb and meter are pure: numbers in, decisions out, with the caller's clock. Never starts a process.
"""
