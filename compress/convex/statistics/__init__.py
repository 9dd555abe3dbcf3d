"""Sufficient statistics: compensated sums, centred moments, factored and shrunk ones, eigenvalues."""
