"""The report of a run or a training as a value, and every form of it: pages, tables, checks."""
