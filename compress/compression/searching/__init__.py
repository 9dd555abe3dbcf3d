"""The search for the widths under a budget: damage, its curves over widths, and the tries between."""
