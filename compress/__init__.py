"""Post-training compression of trained networks."""
