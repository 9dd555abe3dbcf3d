"""Looking inside a network: ranks, bounds, balance."""
