"""Penalties on paths and groups, and the couplings of weights that they act on."""
