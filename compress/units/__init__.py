"""Groups of units: what can be cut as a whole, what feeds and reads it, and the surgery that takes it out."""
