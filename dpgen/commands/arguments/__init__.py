"""Parse the command line: the parser that all commands share, vLLM's own flags, shell completion.

In: the arguments of one command. Out: its options, or one line of usage error and exit status 2.
Never imports a command.
"""
