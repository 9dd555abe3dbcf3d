"""The compression of a network: a sweep over its groups of units, and the search for widths under a budget."""
