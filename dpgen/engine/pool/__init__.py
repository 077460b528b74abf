"""Several engines of one rank, which look like one: routing, growth, and the number that pays.

In: what one engine would get; how many there are, or may be.
Out: the rows and statistics of all of them; a line on their number. Each engine dies, restarts and is abandoned alone.
"""
