"""One group of units: which are kept, the refit of what reads them, certificates, the result as a value."""
