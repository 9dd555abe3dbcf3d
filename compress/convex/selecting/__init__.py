"""Which units to keep: backward elimination, forward paths, best swaps."""
