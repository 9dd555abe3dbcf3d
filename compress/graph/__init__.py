"""The network as a program of operations: traced once, interpreted over any number of states, priced."""
