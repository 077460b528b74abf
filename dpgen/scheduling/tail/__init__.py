"""Plan the end of a run, where rows' lengths are expected: which ranks take the longest rows, and who stops claiming.

In: expected lengths (`RowOrder.lengths`), what a rank holds, totals of all ranks. Out: blocks of the longest rows, each
for one rank; whether a rank should leave the next row to others; and the time that no schedule can beat (`bound`).
Pure arithmetic, without clocks, stores or engines.
"""
