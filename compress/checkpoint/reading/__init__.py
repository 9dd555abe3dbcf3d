"""Weights out of files: archives, pickles taken apart without running them, safetensors."""
