"""Hold the commands of `dpgen`, one module each: `add_arguments(parser)` and `main(options)`.

In: the options that `dpgen.cli` has parsed. Out: text on stdout, errors on stderr, and the exit status.
Importing a command's module loads nothing heavy, so that `--help` is instant: its `main` imports what it needs.
Never imports `dpgen.cli`; no command imports another one.
"""
