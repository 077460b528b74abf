"""Make the report on a run: one page that needs no network, for a run that is finished, live, stopped or dead.

In: a run directory, of this or an older version of dpgen; whatever is missing there is missing on the page, which says
so. Out: RUN_DIR/report.html. `facts` reads, `page` renders, `writing` keeps a failure or a slow disk from the run.
Memory stays flat and time bounded: of many rows a sample is read. Nothing here imports an engine, and no command is
imported.
"""
