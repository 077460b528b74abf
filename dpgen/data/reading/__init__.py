"""Reading: input files in; one Arrow file in the cache of `datasets` out, with the values that the files hold.

- `files` names the files and what they are, `cache` keeps the Arrow file, `conversion` makes it, one reader a kind.
- A value is never changed without a note: a type that can't hold a column's values exactly gives way to JSON text.
- Nothing here imports `datasets`; `dpgen.data.input_loading` opens the Arrow file with it.
"""
