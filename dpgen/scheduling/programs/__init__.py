"""Run rows' programs: many calls a row, each a request like any other, journaled and never repeated."""
